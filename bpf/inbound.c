// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* Connections that arrive: the data plane's listening socket is chosen in place of the application's. The accepted
 * socket keeps the address the client asked for.
 */

/* The first of a family's listening sockets. The kernel balances over its SO_REUSEPORT group by itself. */
static __always_inline struct bpf_sock *first_listener(u32 base) {
  for (u32 i = 0; i < SLOTS; i++) {
    u32 slot = base + i;
    struct bpf_sock *found = listeners.lookup(&slot);
    if (found)
      return found;
  }
  return 0;
}

/* One attempt outside the loop: a loop that may go on after it is too much for the verifier of Linux 6.1. */
static __always_inline int assigned(struct bpf_sk_lookup *ctx, struct flow *flow) {
  struct bpf_sock *found = first_listener(flow->ipv6 ? SLOTS : 0);
  if (!found && !flow->ipv6)
    found = first_listener(SLOTS); /* a listener on :: that takes IPv4 too */
  if (!found)
    return 0;
  int failed = bpf_sk_assign(ctx, found, 0);
  bpf_sk_release(found);
  return !failed;
}

static __always_inline int is_from_here(struct flow *flow) {
  if (flow->from.word[0] == flow->to.word[0] && flow->from.word[1] == flow->to.word[1] &&
      flow->from.word[2] == flow->to.word[2] && flow->from.word[3] == flow->to.word[3])
    return 1;
  if (flow->ipv6 && is_small6(&flow->from, 1))
    return 1;
  return is_local(flow, &flow->from);
}

int sk_lookup(struct bpf_sk_lookup *ctx) {
  int zero = 0;
  struct settings *set = settings.lookup(&zero);
  u64 *netns = anchor.lookup(&zero);
  struct flow flow = {.port = READ(ctx, local_port), .netns = netns ? *netns : 0};
  int udp = READ(ctx, protocol) == IPPROTO_UDP;
  if (!set || (READ(ctx, protocol) != IPPROTO_TCP && !(udp && is_guarded(set, flow.port, udp))))
    return SK_PASS;
  if (READ(ctx, family) == AF_INET6) {
    flow.ipv6 = 1;
    flow.from.word[0] = READ(ctx, remote_ip6[0]);
    flow.from.word[1] = READ(ctx, remote_ip6[1]);
    flow.from.word[2] = READ(ctx, remote_ip6[2]);
    flow.from.word[3] = READ(ctx, remote_ip6[3]);
    flow.to.word[0] = READ(ctx, local_ip6[0]);
    flow.to.word[1] = READ(ctx, local_ip6[1]);
    flow.to.word[2] = READ(ctx, local_ip6[2]);
    flow.to.word[3] = READ(ctx, local_ip6[3]);
  } else {
    map4(&flow.from, READ(ctx, remote_ip4));
    map4(&flow.to, READ(ctx, local_ip4));
  }
  /* The kernel drops packets from outside that claim to come from one of its own addresses, so these are ours. */
  if (!serves(set, &flow) || is_from_here(&flow))
    return SK_PASS;
  /* A container's connection that nf_tables redirected to here; others do not come this far. */
  if (set->flags & FLAG_CONTAINERS &&
      ((!udp && flow.port == set->outbound_port) ||
       ((udp || set->flags & FLAG_DNS_TCP) && flow.port == set->dns_port)))
    return SK_PASS;
  if (is_guarded(set, flow.port, udp)) {
    count(RULE_G1_INBOUND, flow.ipv6);
    return SK_DROP;
  }
  int rule = RULE_L1;
  if (!means_this_host(&flow.to))
    rule = inbound_rule(set, &flow, &flow.from);
  if (rule != RULE_I5 && rule != RULE_I7) {
    count(rule, flow.ipv6);
    return SK_PASS;
  }
  if (assigned(ctx, &flow)) {
    count(rule, flow.ipv6);
    return SK_PASS;
  }
  int bypass = set->flags & FLAG_BYPASS;
  count(bypass ? RULE_BYPASSED_INBOUND : RULE_REFUSED_INBOUND, flow.ipv6);
  return bypass ? SK_PASS : SK_DROP; /* dropped: the client is told that the connection is refused */
}

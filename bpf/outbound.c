// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* Connections and queries that processes of this host open: the destination is changed before the kernel sees it, so no
 * packet is ever translated. What was asked for is kept with the socket, and goes when the socket goes.
 */

static __always_inline struct settings *settings_of(u64 netns) {
  int zero = 0;
  struct settings *set = settings.lookup(&zero);
  return set && set->netns == name_of(netns) ? set : 0;
}

static __always_inline void map4(struct address *into, u32 ip) {
  into->word[0] = 0;
  into->word[1] = 0;
  into->word[2] = MAPPED;
  into->word[3] = ip;
}

/* Whether the data plane has a socket on a port, as a connection to it would find. */
static __always_inline int answers(struct bpf_sock_addr *ctx, struct flow *flow, u16 port, int udp) {
  struct bpf_sock_tuple tuple = {};
  int size;
  if (flow->ipv6) {
    tuple.ipv6.daddr[3] = htonl(1);
    tuple.ipv6.saddr[3] = htonl(1);
    tuple.ipv6.dport = htons(port);
    size = sizeof(tuple.ipv6);
  } else {
    tuple.ipv4.daddr = LOCAL4;
    tuple.ipv4.saddr = LOCAL4;
    tuple.ipv4.dport = htons(port);
    size = sizeof(tuple.ipv4);
  }
  struct bpf_sock *found;
  if (udp)
    found = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
  else
    found = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
  if (!found)
    return 0;
  bpf_sk_release(found);
  return 1;
}

#define REFUSED -1
#define RESET -2
#define NOBODY 0 /* no socket is ever bound to port 0, so the kernel answers as for any port without a listener */

/* What a connected socket of IPv6 sends to an IPv4 address comes by with the address that connect() was given in place of
 * the one it asked for. */
static __always_inline int was_redirected(struct bpf_sock *sk) {
  struct asked *kept = READ(sk, state) == TCP_ESTABLISHED ? asked.sk_storage_get(sk, 0, 0) : 0;
  return kept && kept->role == ROLE_CLIENT;
}

/* The port to go to instead, 0, REFUSED or RESET; remembers with the socket what was asked for. `datagram` is a
 * constant: where only UDP comes by, the rules of TCP are left out. */
static __always_inline int redirect(struct bpf_sock_addr *ctx, struct flow *flow, int datagram) {
  struct bpf_sock *sk = READ(ctx, sk);
  if (!sk)
    return 0;
  u64 sock = address_of(sk);
  flow->netns = netns_of(sock);
  struct settings *set = settings_of(flow->netns);
  if (!set || !serves(set, flow))
    return 0;
  flow->uid = uid_of(sock);
  int udp = datagram || READ(ctx, protocol) == IPPROTO_UDP;
  if (!udp && READ(ctx, protocol) != IPPROTO_TCP)
    return 0;
  if (is_aimed(set, flow, udp) && !(datagram && was_redirected(sk))) {
    count(RULE_G1_OUTBOUND, flow->ipv6);
    asked.sk_storage_delete(sk);
    return datagram ? REFUSED : RESET;
  }
  /* From there a packet for the data plane might leave on the wire. */
  u32 bound = READ(sk, bound_dev_if);
  int is_bound = bound && bound != LOOPBACK_IFINDEX;
  int rule = RULE_S1;
  if (is_excluded_mark(READ(sk, mark))) {
    rule = RULE_M1;
  } else if (!is_scoped(flow)) {
    rule = RULE_D1;
    if (!is_bound)
      rule = udp ? udp_rule(set, flow) : tcp_rule(set, flow);
  }
  u16 port = port_for(set, rule);
  if (port && set->flags & FLAG_BYPASS && !answers(ctx, flow, port, udp)) {
    rule = rule == RULE_D3 ? RULE_BYPASSED_DNS : rule == RULE_O3 ? RULE_BYPASSED_INBOUND : RULE_BYPASSED_OUTBOUND;
    port = 0;
  }
  count(rule, flow->ipv6);
  if (!port) {
    /* A socket may be connected again. One that is not connected may ask several servers, and an answer of the data plane
     * to an earlier query still has to look like the server's. What a connected socket of IPv6 sends to an IPv4 address
     * comes by here with the address that connect() was given in its place. */
    if (!datagram || (flow->port == set->dns_port && READ(sk, state) != TCP_ESTABLISHED))
      asked.sk_storage_delete(sk);
    return 0;
  }
  struct asked *kept = asked.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!kept)
    return set->flags & FLAG_BYPASS ? 0 : REFUSED; /* no memory; the data plane could not tell where to */
  kept->address = flow->to;
  kept->port = flow->port;
  kept->role = ROLE_CLIENT;
  return port;
}

static __always_inline int redirect4(struct bpf_sock_addr *ctx, int datagram) {
  struct flow flow = {.port = ntohs(READ(ctx, user_port))};
  u32 ip = READ(ctx, user_ip4);
  struct bpf_sock *sk = READ(ctx, sk);
  map4(&flow.to, ip ? ip : LOCAL4); /* 0.0.0.0 means this host */
  u32 source = sk ? READ(sk, src_ip4) : 0;
  if (source)
    map4(&flow.from, source);
  int port = redirect(ctx, &flow, datagram);
  if (port == RESET)
    WRITE(ctx, user_port, NOBODY);
  if (port <= 0)
    return port == REFUSED ? REFUSE : ALLOW;
  WRITE(ctx, user_ip4, LOCAL4);
  WRITE(ctx, user_port, htons(port));
  return ALLOW;
}

static __always_inline int redirect6(struct bpf_sock_addr *ctx, int datagram) {
  struct flow flow = {.port = ntohs(READ(ctx, user_port))};
  struct bpf_sock *sk = READ(ctx, sk);
  flow.to.word[0] = READ(ctx, user_ip6[0]);
  flow.to.word[1] = READ(ctx, user_ip6[1]);
  flow.to.word[2] = READ(ctx, user_ip6[2]);
  flow.to.word[3] = READ(ctx, user_ip6[3]);
  flow.ipv6 = 1;
  if (!flow.to.word[0] && !flow.to.word[1]) {
    if (flow.to.word[2] == MAPPED)
      flow.ipv6 = 0;
    else if (!flow.to.word[2] && !flow.to.word[3])
      flow.to.word[3] = htonl(1); /* :: means this host */
  }
  if (flow.ipv6 && sk) {
    flow.from.word[0] = READ(sk, src_ip6[0]);
    flow.from.word[1] = READ(sk, src_ip6[1]);
    flow.from.word[2] = READ(sk, src_ip6[2]);
    flow.from.word[3] = READ(sk, src_ip6[3]);
  } else if (sk) {
    u32 source = READ(sk, src_ip4);
    if (source)
      map4(&flow.from, source);
  }
  int port = redirect(ctx, &flow, datagram);
  if (port == RESET)
    WRITE(ctx, user_port, NOBODY);
  if (port <= 0)
    return port == REFUSED ? REFUSE : ALLOW;
  WRITE(ctx, user_ip6[0], 0);
  WRITE(ctx, user_ip6[1], 0);
  WRITE(ctx, user_ip6[2], flow.ipv6 ? 0 : MAPPED);
  WRITE(ctx, user_ip6[3], flow.ipv6 ? htonl(1) : LOCAL4);
  WRITE(ctx, user_port, htons(port));
  return ALLOW;
}

int connect4(struct bpf_sock_addr *ctx) {
  return redirect4(ctx, 0);
}

int connect6(struct bpf_sock_addr *ctx) {
  return redirect6(ctx, 0);
}

int sendmsg4(struct bpf_sock_addr *ctx) {
  return redirect4(ctx, 1);
}

int sendmsg6(struct bpf_sock_addr *ctx) {
  return redirect6(ctx, 1);
}

/* What the socket asked for, when its other end is the data plane on this host. `any` allows every one of its ports. */
static __always_inline struct asked *asked_of(struct bpf_sock_addr *ctx, u16 port, int any) {
  int zero = 0;
  struct settings *set = settings.lookup(&zero);
  struct bpf_sock *sk = READ(ctx, sk);
  if (!set || !sk)
    return 0;
  if (port != set->dns_port && !(any && (port == set->outbound_port || port == set->inbound_port)))
    return 0;
  struct asked *kept = asked.sk_storage_get(sk, 0, 0);
  return kept && kept->role == ROLE_CLIENT ? kept : 0;
}

static __always_inline void restore4(struct bpf_sock_addr *ctx, int any) {
  if (READ(ctx, user_ip4) != LOCAL4)
    return;
  struct asked *kept = asked_of(ctx, ntohs(READ(ctx, user_port)), any);
  if (!kept)
    return;
  u32 ip = kept->address.word[3];
  u16 port = kept->port;
  WRITE(ctx, user_ip4, ip);
  WRITE(ctx, user_port, htons(port));
}

static __always_inline void restore6(struct bpf_sock_addr *ctx, int any) {
  u32 third = READ(ctx, user_ip6[2]), last = READ(ctx, user_ip6[3]);
  if (!(!third && last == htonl(1)) && !(third == MAPPED && last == LOCAL4))
    return;
  struct asked *kept = asked_of(ctx, ntohs(READ(ctx, user_port)), any);
  if (!kept)
    return;
  struct address to = kept->address;
  u16 port = kept->port;
  WRITE(ctx, user_ip6[0], to.word[0]);
  WRITE(ctx, user_ip6[1], to.word[1]);
  WRITE(ctx, user_ip6[2], to.word[2]);
  WRITE(ctx, user_ip6[3], to.word[3]);
  WRITE(ctx, user_port, htons(port));
}

int recvmsg4(struct bpf_sock_addr *ctx) {
  restore4(ctx, 0);
  return ALLOW;
}

int recvmsg6(struct bpf_sock_addr *ctx) {
  restore6(ctx, 0);
  return ALLOW;
}

int getpeername4(struct bpf_sock_addr *ctx) {
  restore4(ctx, 1);
  return ALLOW;
}

int getpeername6(struct bpf_sock_addr *ctx) {
  restore6(ctx, 1);
  return ALLOW;
}

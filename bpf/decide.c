// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* agent/tpctl/spec/decide.py for the kernel: the same rules in the same order. Each function returns the rule that decided. */

struct flow {
  u64 netns;
  struct address from; /* all zero when the application did not choose its source */
  struct address to;
  u32 uid;
  u16 port; /* host byte order */
  u16 ipv6; /* 1 for IPv6, so that it can be added to a list's number */
};

static __always_inline int on_list(u32 list, u16 port) {
  int index = list;
  struct ports *found = ports.lookup(&index);
  return found && (found->bits[(port >> 6) & 1023] >> (port & 63)) & 1;
}

static __always_inline int in_networks(u32 list, struct flow *flow, struct address *address) {
  struct network_key key = {.prefix = 160, .list = list + flow->ipv6, .address = *address};
  return networks.lookup(&key) != 0;
}

static __always_inline struct user *excluded_user(u32 uid) {
  struct user_key key = {.prefix = 32, .uid = htonl(uid)};
  return users.lookup(&key);
}

/* Without branches: the verifier of an older kernel would follow each of them through the rest of the program. The
 * highest bit of (off | -off) is 0 for an `off` of 0 alone. */
static __always_inline int is_excluded_mark(u32 mark) {
  int zero = 0;
  struct marks *excluded = marks.lookup(&zero);
  u32 found = 0;
  if (!excluded)
    return 0;
#pragma unroll
  for (int i = 0; i < MAX_MARKS; i++) {
    u32 off = (mark & excluded->mark[i].mask) ^ excluded->mark[i].value;
    found |= ~(off | -off);
  }
  return found >> 31;
}

static __always_inline int is_address4(struct address *address, u32 ip) {
  return !address->word[0] && !address->word[1] && address->word[2] == MAPPED && address->word[3] == ip;
}

/* ::1 and ::6 */
static __always_inline int is_small6(struct address *address, u32 last) {
  return !address->word[0] && !address->word[1] && !address->word[2] && address->word[3] == htonl(last);
}

static __always_inline int is_scoped(struct flow *flow) {
  return flow->ipv6 && (flow->to.word[0] & htonl(0xffc00000)) == htonl(0xfe800000);
}

/* 127.0.0.0/8 and 0.0.0.0/8, ::1 and ::, and the former as addresses of IPv6: what arrives for them is the kernel's. */
static __always_inline int means_this_host(struct address *address) {
  u32 first = ntohl(address->word[3]) >> 24;
  if (address->word[0] || address->word[1])
    return 0;
  if (address->word[2] == MAPPED)
    return first == 127 || !first;
  return !address->word[2] && !(address->word[3] & htonl(~1));
}

static __always_inline int is_local(struct flow *flow, struct address *address) {
  return flow->ipv6 ? is_local6(flow->netns, address) : is_local4(flow->netns, address->word[3]);
}

static __always_inline int serves(struct settings *set, struct flow *flow) {
  return set->flags & (flow->ipv6 ? FLAG_IPV6 : FLAG_IPV4);
}

static __always_inline int captured_query(struct settings *set, struct flow *flow) {
  if (flow->port != DNS_PORT || !(set->flags & (flow->ipv6 ? FLAG_DNS_IPV6 : FLAG_DNS_IPV4)))
    return 0;
  return set->flags & FLAG_DNS_ALL || servers.lookup(&flow->to);
}

/* Whether a port is one of the data plane's own (g1). A query to port 53 looks like one that is redirected to it. */
static __always_inline int is_guarded(struct settings *set, u16 port, int udp) {
  if (!(set->flags & FLAG_GUARD) || port == DNS_PORT)
    return 0;
  return port == set->dns_port || (!udp && (port == set->inbound_port || port == set->outbound_port));
}

static __always_inline int is_to_local(struct flow *flow) {
  return flow->ipv6 ? is_small6(&flow->to, 1) : is_address4(&flow->to, LOCAL4);
}

/* Whether the destination is this host's: by one of its addresses, or by a prefix that is local as a whole (AnyIP). */
static __always_inline int stays_here(struct flow *flow) {
  return is_to_local(flow) || in_networks(LOCAL_NETWORKS, flow, &flow->to) || is_local(flow, &flow->to);
}

/* Whether a connection that is opened here is aimed at the data plane; its own user may do so. */
static __always_inline int is_aimed(struct settings *set, struct flow *flow, int udp) {
  return is_guarded(set, flow->port, udp) && flow->uid != set->proxy_uid && stays_here(flow);
}

static __always_inline int inbound_rule(struct settings *set, struct flow *flow, struct address *from) {
  if (!(set->flags & FLAG_INBOUND))
    return RULE_I3;
  if (in_networks(EXCLUDED_SOURCES, flow, from))
    return RULE_I4;
  int listed = on_list(PORTS_INBOUND, flow->port);
  if (set->flags & FLAG_INBOUND_INCLUDE)
    return listed ? RULE_I5 : RULE_I5_PASS;
  return listed ? RULE_I6 : RULE_I7;
}

static __always_inline int udp_rule(struct settings *set, struct flow *flow) {
  if (!captured_query(set, flow))
    return RULE_D0;
  struct user *user = excluded_user(flow->uid);
  if (user && user->dns)
    return RULE_X1;
  if (in_networks(EXCLUDED_DESTINATIONS, flow, &flow->to))
    return RULE_X2;
  return flow->uid == set->proxy_uid ? RULE_D2 : RULE_D3;
}

/* The source the kernel will choose for a connection to an address of this host. */
static __always_inline void choose_source(struct flow *flow) {
  if (flow->from.word[0] || flow->from.word[1] || flow->from.word[2] || flow->from.word[3])
    return;
  flow->from = flow->to;
  if (!flow->ipv6 && ntohl(flow->to.word[3]) >> 24 == 127)
    flow->from.word[3] = LOCAL4;
}

static __always_inline int owner_rule(struct settings *set, struct flow *flow, int listed) {
  int from_proxy = flow->uid == set->proxy_uid;
  int to_local = is_to_local(flow);
  if (stays_here(flow)) {
    if (flow->ipv6 ? is_small6(&flow->from, 6) : is_address4(&flow->from, PASSTHROUGH4))
      return RULE_O2;
    if (!from_proxy)
      return RULE_O4;
    if (!to_local) {
      choose_source(flow);
      int arrived = inbound_rule(set, flow, &flow->from);
      if (arrived == RULE_I5 || arrived == RULE_I7)
        return RULE_O3;
    }
  }
  if (from_proxy)
    return RULE_O5;
  if (to_local)
    return RULE_O6;
  return set->flags & FLAG_OUTBOUND_INCLUDE && !listed ? RULE_O7_PASS : RULE_O7;
}

static __always_inline int tcp_rule(struct settings *set, struct flow *flow) {
  int from_proxy = flow->uid == set->proxy_uid;
  struct user *user = excluded_user(flow->uid);
  if (user && user->tcp_ports && on_list(user->tcp_ports, flow->port))
    return RULE_X1;
  if (in_networks(EXCLUDED_DESTINATIONS, flow, &flow->to))
    return RULE_X2;
  if (flow->port == DNS_PORT && !from_proxy && set->flags & (flow->ipv6 ? FLAG_DNS_IPV6 : FLAG_DNS_IPV4))
    return set->flags & FLAG_DNS_TCP && captured_query(set, flow) ? RULE_D4 : RULE_X4;
  if (!(set->flags & FLAG_OUTBOUND))
    return RULE_O0;
  int listed = on_list(PORTS_OUTBOUND, flow->port);
  if (!(set->flags & FLAG_OUTBOUND_INCLUDE) && listed)
    return RULE_O1;
  return owner_rule(set, flow, listed);
}

/* The data plane's port for a connection of this host that a rule redirects, else 0. */
static __always_inline u16 port_for(struct settings *set, int rule) {
  switch (rule) {
  case RULE_O7:
    return set->outbound_port;
  case RULE_O3:
    return set->inbound_port;
  case RULE_D3:
  case RULE_D4:
    return set->dns_port;
  }
  return 0;
}

static __always_inline void count(int rule, u16 ipv6) {
  int index = rule * FAMILIES + ipv6;
  u64 *value = counters.lookup(&index);
  if (value)
    *value += 1; /* the entry is this CPU's */
}

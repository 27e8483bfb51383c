// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* The data plane's side: where a connection it accepted was going, and its listening sockets for inbound.c. */

static __always_inline int is_zero(struct address *address) {
  return !address->word[0] && !address->word[1] && !address->word[2] && !address->word[3];
}

static __always_inline int is_data_planes(struct settings *set, u32 port) {
  return port == set->outbound_port || port == set->inbound_port || port == set->dns_port;
}

/* The SYN is about to leave: now the client's port is known. A connection that dials the data plane itself may have the
 * port of one that was refused, whose entry is still there and must not speak for it. */
static __always_inline void departs(struct bpf_sock_ops *ctx) {
  struct bpf_sock *sk = READ(ctx, sk);
  int zero = 0;
  struct settings *set = settings.lookup(&zero);
  u32 port;
  port = READ(ctx, remote_port);
  port = ntohl(port);
  if (!sk || !set)
    return;
  struct asked *kept = asked.sk_storage_get(sk, 0, 0);
  int redirected = kept && kept->role == ROLE_CLIENT;
  if (!redirected && !is_data_planes(set, port))
    return;
  struct in_flight_key key = {.netns = netns_of(address_of(sk)), .port = port};
  u32 local4;
  local4 = READ(ctx, local_ip4);
  struct address remote = {};
  remote.word[0] = READ(ctx, remote_ip6[0]);
  remote.word[1] = READ(ctx, remote_ip6[1]);
  remote.word[2] = READ(ctx, remote_ip6[2]);
  key.client.word[0] = READ(ctx, local_ip6[0]);
  key.client.word[1] = READ(ctx, local_ip6[1]);
  key.client.word[2] = READ(ctx, local_ip6[2]);
  key.client.word[3] = READ(ctx, local_ip6[3]);
  /* A socket of IPv6 may go to an address of IPv4. */
  if (READ(ctx, family) == AF_INET || (!remote.word[0] && !remote.word[1] && remote.word[2] == MAPPED))
    map4(&key.client, local4);
  key.client_port = READ(ctx, local_port);
  if (!kept || !redirected) {
    in_flight.delete(&key);
    return;
  }
  struct asked value = *kept;
  value.role = ROLE_SERVER;
  in_flight.update(&key, &value);
}

/* The data plane's socket is there: what it stands for moves to it. */
static __always_inline void arrives(struct bpf_sock_ops *ctx) {
  int zero = 0;
  struct settings *set = settings.lookup(&zero);
  u32 port = READ(ctx, local_port);
  if (!set || !is_data_planes(set, port))
    return;
  struct bpf_sock *sk = READ(ctx, sk);
  if (!sk)
    return;
  struct in_flight_key key = {.netns = netns_of(address_of(sk)), .port = port};
  if (READ(ctx, family) == AF_INET6) {
    key.client.word[0] = READ(ctx, remote_ip6[0]);
    key.client.word[1] = READ(ctx, remote_ip6[1]);
    key.client.word[2] = READ(ctx, remote_ip6[2]);
    key.client.word[3] = READ(ctx, remote_ip6[3]);
  } else {
    key.client.word[2] = MAPPED;
    key.client.word[3] = READ(ctx, remote_ip4);
  }
  key.client_port = ntohl(READ(ctx, remote_port));
  struct asked *value = in_flight.lookup(&key);
  if (!value)
    return;
  struct asked *kept = asked.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (kept)
    *kept = *value;
  in_flight.delete(&key);
}

/* Somebody begins to listen. Only sockets bound to the wildcard address count: nobody else can have one of these on the
 * same port, so no other user can put himself in the data plane's place. */
static __always_inline void listens(struct bpf_sock_ops *ctx) {
  int zero = 0;
  struct settings *set = settings.lookup(&zero);
  if (!set || READ(ctx, local_port) != set->inbound_port)
    return;
  struct bpf_sock *sk = READ(ctx, sk);
  if (!sk || set->netns != name_of(netns_of(address_of(sk))) || READ(sk, bound_dev_if))
    return;
  u32 base = 0;
  if (READ(ctx, family) == AF_INET6) {
    struct address local;
    local.word[0] = READ(ctx, local_ip6[0]);
    local.word[1] = READ(ctx, local_ip6[1]);
    local.word[2] = READ(ctx, local_ip6[2]);
    local.word[3] = READ(ctx, local_ip6[3]);
    if (!is_zero(&local))
      return;
    base = SLOTS;
  } else if (READ(ctx, local_ip4)) {
    return;
  }
  for (u32 i = 0; i < SLOTS; i++) {
    u32 slot = base + i;
    int taken = listeners.sock_map_update(ctx, &slot, BPF_NOEXIST); /* bcc adds a semicolon of its own */
    if (!taken)
      return;
  }
}

int sockops(struct bpf_sock_ops *ctx) {
  switch (READ(ctx, op)) {
  case BPF_SOCK_OPS_TCP_CONNECT_CB:
    departs(ctx);
    break;
  case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
    arrives(ctx);
    break;
  case BPF_SOCK_OPS_TCP_LISTEN_CB:
    listens(ctx);
    break;
  }
  return ALLOW;
}

struct sockaddr_v4 {
  u16 family;
  u16 port;
  u32 address;
  u64 zero;
};

struct sockaddr_v6 {
  u16 family;
  u16 port;
  u32 flow;
  u32 address[4];
  u32 scope;
};

static __always_inline void answer(struct bpf_sockopt *ctx, struct address *address, u16 port) {
  int ipv4 = !address->word[0] && !address->word[1] && address->word[2] == MAPPED;
  if (READ(ctx, level) == SOL_IP && ipv4) {
    struct sockaddr_v4 *name = READ(ctx, optval);
    if ((void *)(name + 1) > READ(ctx, optval_end))
      return;
    name->family = AF_INET;
    name->port = htons(port);
    name->address = address->word[3];
    name->zero = 0;
    WRITE(ctx, optlen, sizeof(*name));
    WRITE(ctx, retval, 0);
  } else if (READ(ctx, level) == SOL_IPV6 && !ipv4) {
    struct sockaddr_v6 *name = READ(ctx, optval);
    if ((void *)(name + 1) > READ(ctx, optval_end))
      return;
    name->family = AF_INET6;
    name->port = htons(port);
    name->flow = 0;
    name->address[0] = address->word[0];
    name->address[1] = address->word[1];
    name->address[2] = address->word[2];
    name->address[3] = address->word[3];
    name->scope = 0;
    WRITE(ctx, optlen, sizeof(*name));
    WRITE(ctx, retval, 0);
  }
}

/* Connections that sk_lookup gave to the data plane have their original destination as their own address. conntrack
 * answers so too for whatever it did not translate, whoever asks; it is no longer needed for that. At the outbound port
 * there is no such connection, and one whose destination was lost must not look as if it went to the data plane. */
static __always_inline void answer_own_name(struct bpf_sockopt *ctx, struct settings *set, struct bpf_sock *sk) {
  u32 port = READ(sk, src_port);
  if (READ(ctx, retval) >= 0 || READ(sk, protocol) != IPPROTO_TCP || READ(sk, state) != TCP_ESTABLISHED)
    return;
  if (port == set->outbound_port)
    return;
  struct address own = {};
  if (READ(sk, family) == AF_INET6) {
    own.word[0] = READ(sk, src_ip6[0]);
    own.word[1] = READ(sk, src_ip6[1]);
    own.word[2] = READ(sk, src_ip6[2]);
    own.word[3] = READ(sk, src_ip6[3]);
  } else {
    own.word[2] = MAPPED;
    own.word[3] = READ(sk, src_ip4);
  }
  answer(ctx, &own, port);
}

int getsockopt(struct bpf_sockopt *ctx) {
  struct bpf_sock *sk = READ(ctx, sk);
  if (READ(ctx, optname) != SO_ORIGINAL_DST || (READ(ctx, level) != SOL_IP && READ(ctx, level) != SOL_IPV6) || !sk)
    return ALLOW;
  struct asked *kept = asked.sk_storage_get(sk, 0, 0);
  if (kept && kept->role == ROLE_SERVER) {
    struct address to = kept->address;
    answer(ctx, &to, kept->port);
    return ALLOW;
  }
  u64 netns = netns_of(address_of(sk));
  struct settings *set = settings_of(netns);
  if (!set)
    return ALLOW;
  int zero = 0;
  u64 *pointer = anchor.lookup(&zero);
  if (pointer && *pointer != netns)
    *pointer = netns;
  answer_own_name(ctx, set, sk);
  return ALLOW;
}

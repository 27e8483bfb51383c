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
  struct bpf_sock *sk = ctx->sk;
  int zero = 0;
  struct settings *set = settings.lookup(&zero);
  u32 port;
  LOAD(port, ctx->remote_port);
  port = ntohl(port);
  if (!sk || !set)
    return;
  struct asked *kept = asked.sk_storage_get(sk, 0, 0);
  int redirected = kept && kept->role == ROLE_CLIENT;
  if (!redirected && !is_data_planes(set, port))
    return;
  struct in_flight_key key = {.netns = netns_of(address_of(sk)), .port = port};
  u32 local4;
  LOAD(local4, ctx->local_ip4);
  struct address remote = {};
  LOAD(remote.word[0], ctx->remote_ip6[0]);
  LOAD(remote.word[1], ctx->remote_ip6[1]);
  LOAD(remote.word[2], ctx->remote_ip6[2]);
  LOAD(key.client.word[0], ctx->local_ip6[0]);
  LOAD(key.client.word[1], ctx->local_ip6[1]);
  LOAD(key.client.word[2], ctx->local_ip6[2]);
  LOAD(key.client.word[3], ctx->local_ip6[3]);
  /* A socket of IPv6 may go to an address of IPv4. */
  if (ctx->family == AF_INET || (!remote.word[0] && !remote.word[1] && remote.word[2] == MAPPED))
    map4(&key.client, local4);
  key.client_port = ctx->local_port;
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
  u32 port = ctx->local_port;
  if (!set || !is_data_planes(set, port))
    return;
  struct bpf_sock *sk = ctx->sk;
  if (!sk)
    return;
  struct in_flight_key key = {.netns = netns_of(address_of(sk)), .port = port};
  if (ctx->family == AF_INET6) {
    LOAD(key.client.word[0], ctx->remote_ip6[0]);
    LOAD(key.client.word[1], ctx->remote_ip6[1]);
    LOAD(key.client.word[2], ctx->remote_ip6[2]);
    LOAD(key.client.word[3], ctx->remote_ip6[3]);
  } else {
    key.client.word[2] = MAPPED;
    key.client.word[3] = ctx->remote_ip4;
  }
  key.client_port = ntohl(ctx->remote_port);
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
  if (!set || ctx->local_port != set->inbound_port)
    return;
  struct bpf_sock *sk = ctx->sk;
  if (!sk || set->netns != name_of(netns_of(address_of(sk))) || sk->bound_dev_if)
    return;
  u32 base = 0;
  if (ctx->family == AF_INET6) {
    struct address local;
    LOAD(local.word[0], ctx->local_ip6[0]);
    LOAD(local.word[1], ctx->local_ip6[1]);
    LOAD(local.word[2], ctx->local_ip6[2]);
    LOAD(local.word[3], ctx->local_ip6[3]);
    if (!is_zero(&local))
      return;
    base = SLOTS;
  } else if (ctx->local_ip4) {
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
  switch (ctx->op) {
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
  if (ctx->level == SOL_IP && ipv4) {
    struct sockaddr_v4 *name = ctx->optval;
    if ((void *)(name + 1) > ctx->optval_end)
      return;
    name->family = AF_INET;
    name->port = htons(port);
    name->address = address->word[3];
    name->zero = 0;
    ctx->optlen = sizeof(*name);
    ctx->retval = 0;
  } else if (ctx->level == SOL_IPV6 && !ipv4) {
    struct sockaddr_v6 *name = ctx->optval;
    if ((void *)(name + 1) > ctx->optval_end)
      return;
    name->family = AF_INET6;
    name->port = htons(port);
    name->flow = 0;
    name->address[0] = address->word[0];
    name->address[1] = address->word[1];
    name->address[2] = address->word[2];
    name->address[3] = address->word[3];
    name->scope = 0;
    ctx->optlen = sizeof(*name);
    ctx->retval = 0;
  }
}

/* Connections that sk_lookup gave to the data plane have their original destination as their own address. conntrack
 * answers so too for whatever it did not translate, whoever asks; it is no longer needed for that. At the outbound port
 * there is no such connection, and one whose destination was lost must not look as if it went to the data plane. */
static __always_inline void answer_own_name(struct bpf_sockopt *ctx, struct settings *set, struct bpf_sock *sk) {
  u32 port = sk->src_port;
  if (ctx->retval >= 0 || sk->protocol != IPPROTO_TCP || sk->state != TCP_ESTABLISHED)
    return;
  if (port == set->outbound_port)
    return;
  struct address own = {};
  if (sk->family == AF_INET6) {
    LOAD(own.word[0], sk->src_ip6[0]);
    LOAD(own.word[1], sk->src_ip6[1]);
    LOAD(own.word[2], sk->src_ip6[2]);
    LOAD(own.word[3], sk->src_ip6[3]);
  } else {
    own.word[2] = MAPPED;
    own.word[3] = sk->src_ip4;
  }
  answer(ctx, &own, port);
}

int getsockopt(struct bpf_sockopt *ctx) {
  struct bpf_sock *sk = ctx->sk;
  if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6) || !sk)
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

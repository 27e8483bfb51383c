// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* Types, maps and constants that the programs share with agent/tpctl/engines/ebpf/contents.py. The files of this directory are
 * compiled as one text, in the order of agent/tpctl/bpf/build.py: bcc rewrites map accesses only in its main file.
 *
 * NETWORKS, USERS, SERVERS, PORT_LISTS, IN_FLIGHT (entries) and the OFFSET_* are given on the compiler's command line.
 */

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80 /* IP6T_SO_ORIGINAL_DST is the same number */
#define TCP_ESTABLISHED 1
#define DNS_PORT 53
#define RTN_LOCAL 2
#define RT_TABLE_LOCAL 255
#define FAMILIES 2

#define ALLOW 1
#define REFUSE 0 /* EPERM */
#define LOOPBACK_IFINDEX 1 /* in every network namespace */
#define SLOTS 32 /* listening sockets a family */

#define htonl(x) __builtin_bswap32(x)
#define ntohl(x) __builtin_bswap32(x)
#define htons(x) __builtin_bswap16(x)
#define ntohs(x) __builtin_bswap16(x)

#define MAPPED htonl(0xffff)
#define LOCAL4 htonl(0x7f000001)
#define PASSTHROUGH4 htonl(0x7f000006)

/* Nobody reads where an inlined line came from; to carry it along takes the compiler a tenth of its time. */
#undef __always_inline
#define __always_inline inline __attribute__((always_inline, nodebug))

/* Network byte order; IPv4 is mapped into IPv6 (::ffff:192.0.2.1). */
struct address {
  u32 word[4];
};

struct settings {
  u64 netns;
  u32 proxy_uid;
  u32 flags;
  u16 inbound_port;
  u16 outbound_port;
  u16 dns_port;
  u16 version; /* of tpctl; for people */
};

enum {
  FLAG_IPV4 = 1 << 0,
  FLAG_IPV6 = 1 << 1,
  FLAG_INBOUND = 1 << 2,
  FLAG_INBOUND_INCLUDE = 1 << 3,
  FLAG_OUTBOUND = 1 << 4,
  FLAG_OUTBOUND_INCLUDE = 1 << 5,
  FLAG_DNS_IPV4 = 1 << 6,
  FLAG_DNS_IPV6 = 1 << 7,
  FLAG_DNS_ALL = 1 << 8,
  FLAG_DNS_TCP = 1 << 9,
  FLAG_BYPASS = 1 << 10, /* when the data plane does not listen, connections go straight on */
  FLAG_CONTAINERS = 1 << 11, /* what is forwarded for them is redirected by nf_tables */
  FLAG_GUARD = 1 << 12, /* what is opened to the data plane's own ports is refused */
};

struct ports {
  u64 bits[1024];
};

enum { PORTS_INBOUND = 0, PORTS_OUTBOUND = 1 };

struct network_key {
  u32 prefix; /* bits of what follows */
  u32 list;
  struct address address;
};

enum { EXCLUDED_DESTINATIONS = 0, EXCLUDED_SOURCES = 2, LOCAL_NETWORKS = 4 }; /* one more for IPv6 */

struct user_key {
  u32 prefix;
  u32 uid; /* network byte order, so that a range is a few prefixes */
};

struct user {
  u32 tcp_ports; /* index in `ports`; 0 excludes none */
  u32 dns;       /* queries over UDP are excluded */
};

#define MAX_MARKS 32

/* Sockets whose mark has `value` in the bits of `mask` are left alone. One that stands for none has a value outside its
 * mask. */
struct mark {
  u32 value;
  u32 mask;
};

struct marks {
  struct mark mark[MAX_MARKS];
};

/* The rules of agent/tpctl/spec/decide.py. */
enum rule {
  RULE_NONE,
  RULE_G1_INBOUND, RULE_G1_OUTBOUND,
  RULE_S1, RULE_D1, RULE_L1, RULE_I3, RULE_I4, RULE_I5, RULE_I5_PASS, RULE_I6, RULE_I7, RULE_P2,
  RULE_D0, RULE_X1, RULE_X2, RULE_D2, RULE_D3, RULE_D4, RULE_X4,
  RULE_O0, RULE_O1, RULE_O2, RULE_O3, RULE_O4, RULE_O5, RULE_O6, RULE_O7, RULE_O7_PASS,
  RULE_BYPASSED_INBOUND, RULE_REFUSED_INBOUND, RULE_BYPASSED_OUTBOUND, RULE_BYPASSED_DNS,
  RULE_M1,
  RULES
};

/* What a socket of an application asked for, or what a socket that the data plane accepted was going to. */
struct asked {
  struct address address;
  u16 port; /* host byte order */
  u8 role;
  u8 unused;
};

enum { ROLE_CLIENT = 1, ROLE_SERVER = 2 };

/* A redirected connection between its SYN and the data plane's accept. `netns` is the kernel's pointer. */
struct in_flight_key {
  u64 netns;
  struct address client;
  u16 client_port;
  u16 port;
  u32 unused;
};

BPF_TABLE("array", int, struct settings, settings, 1);
BPF_TABLE("array", int, struct ports, ports, PORT_LISTS);
BPF_F_TABLE("lpm_trie", struct network_key, u32, networks, NETWORKS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct user_key, struct user, users, USERS, BPF_F_NO_PREALLOC);
BPF_TABLE("hash", struct address, u32, servers, SERVERS);
BPF_TABLE("array", int, struct marks, marks, 1);
BPF_TABLE("percpu_array", int, u64, counters, RULES * FAMILIES);

/* From here on: what the kernel's traffic fills. These maps outlive a change of policy. */
BPF_F_TABLE("sk_storage", int, struct asked, asked, 0, BPF_F_NO_PREALLOC);
BPF_TABLE("lru_hash", struct in_flight_key, struct asked, in_flight, IN_FLIGHT);
BPF_TABLE("array", int, u64, anchor, 1); /* the kernel's pointer to our network namespace, for sk_lookup */

struct listeners_table_t {
  u32 key;
  u64 leaf;
  void *(*lookup)(u32 *);
  int (*sock_map_update)(void *, void *, u64);
  u32 max_entries;
  int flags;
};
__attribute__((section("maps/sockmap"))) struct listeners_table_t listeners = {.max_entries = SLOTS * FAMILIES};

// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* What no helper tells: the user a socket was created by, its network namespace, and whether an address is this host's.
 *
 * They are read from the kernel's own structures, at offsets taken from the running kernel's BTF. Programs run in an RCU
 * read-side critical section, so nothing read here is freed meanwhile; a bad address reads as zero.
 */

/* A socket's address as a number: the verifier forbids arithmetic on the pointer, but not reading the stack. */
static __always_inline u64 address_of(struct bpf_sock *sk) {
  struct bpf_sock *spilled = sk;
  u64 address = 0;
  bpf_probe_read_kernel(&address, sizeof(address), &spilled);
  return address;
}

static __always_inline u64 read64(u64 at) {
  u64 value = 0;
  bpf_probe_read_kernel(&value, sizeof(value), (void *)at);
  return value;
}

static __always_inline u32 read32(u64 at) {
  u32 value = 0;
  bpf_probe_read_kernel(&value, sizeof(value), (void *)at);
  return value;
}

static __always_inline u16 read16(u64 at) {
  u16 value = 0;
  bpf_probe_read_kernel(&value, sizeof(value), (void *)at);
  return value;
}

static __always_inline u8 read8(u64 at) {
  u8 value = 0;
  bpf_probe_read_kernel(&value, sizeof(value), (void *)at);
  return value;
}

/* Its fsuid when the socket was created (what iptables' owner match reads too). */
static __always_inline u32 uid_of(u64 sock) { return read32(sock + OFFSET_SOCK_UID); }

static __always_inline u64 netns_of(u64 sock) { return read64(sock + OFFSET_SOCK_NET); }

/* What user space knows the namespace by: its cookie, or before Linux 5.14 its inode number. */
static __always_inline u64 name_of(u64 netns) {
#ifdef OFFSET_NET_COOKIE
  return read64(netns + OFFSET_NET_COOKIE);
#else
  return read32(netns + OFFSET_NET_INODE);
#endif
}

/* Whether the table of local routes has an entry for exactly this address: fib_find_node() of net/ipv4/fib_trie.c. */
static __always_inline int is_local4(u64 netns, u32 address) {
  u32 key = ntohl(address);
  if (key >> 24 == 127)
    return 1;
  u64 table = read64(read64(netns + OFFSET_FIB4_TABLES) + RT_TABLE_LOCAL * sizeof(u64));
  for (int i = 0; i < 8 && table; i++) {
    if (read32(table - OFFSET_FIB4_LINK + OFFSET_FIB4_ID) == RT_TABLE_LOCAL)
      break;
    table = read64(table);
  }
  if (!table)
    return 0;
  u64 node = read64(table - OFFSET_FIB4_LINK + OFFSET_FIB4_DATA) + OFFSET_TRIE_ROOT;
  u64 index = 0;
  int found = 0;
  for (int i = 0; i < 34; i++) {
    node = read64(node + OFFSET_NODE_CHILDREN + index * sizeof(u64));
    if (!node)
      return 0;
    u8 bits = read8(node + OFFSET_NODE_BITS);
    index = (u64)(key ^ read32(node + OFFSET_NODE_KEY)) >> (read8(node + OFFSET_NODE_POS) & 63);
    if (bits > 31 || index >> bits)
      return 0;
    if (!bits) {
      found = 1;
      break;
    }
  }
  if (!found)
    return 0;
  u64 alias = read64(node + OFFSET_NODE_CHILDREN);
  for (int i = 0; i < 8 && alias; i++) {
    u64 entry = alias - OFFSET_ALIAS_LINK;
    if (!read8(entry + OFFSET_ALIAS_SLEN) && read8(entry + OFFSET_ALIAS_TYPE) == RTN_LOCAL)
      return 1;
    alias = read64(alias);
  }
  return 0;
}

/* The same for IPv6: the descent of fib6_locate() in net/ipv6/ip6_fib.c, for a prefix of 128 bits. */
static __always_inline int is_local6(u64 netns, struct address *address) {
#ifdef OFFSET_FIB6_TABLE
  u64 table = read64(netns + OFFSET_FIB6_TABLE);
  if (!table)
    return 0;
  u64 node = table + OFFSET_FIB6_ROOT;
  u32 bit = 0;
  for (int i = 0; i < 130; i++) {
    bit = read16(node + OFFSET_FIB6_BIT);
    if (bit > 127)
      break;
    u32 word = address->word[(bit >> 5) & 3];
    if (ntohl(word) & (1u << (31 - (bit & 31))))
      node = read64(node + OFFSET_FIB6_RIGHT);
    else
      node = read64(node + OFFSET_FIB6_LEFT);
    if (!node)
      return 0;
  }
  if (bit != 128)
    return 0;
  u64 leaf = read64(node + OFFSET_FIB6_LEAF);
  if (!leaf || read8(leaf + OFFSET_FIB6_TYPE) != RTN_LOCAL)
    return 0;
  u64 first = leaf + OFFSET_FIB6_ADDRESS;
  struct address held = {};
  bpf_probe_read_kernel(&held, sizeof(held), (void *)first);
  return held.word[0] == address->word[0] && held.word[1] == address->word[1] && held.word[2] == address->word[2] &&
         held.word[3] == address->word[3];
#else
  return 0;
#endif
}

// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* Moves the bytes of the relay's chatty connections from socket to socket (`tpctl relay --accelerate sockmap`).
 *
 * The kernel runs `pass_on` for each buffer that a socket of `sources` receives, one after the other, under the socket's
 * lock. What is redirected waits in a queue of the other socket, which a kernel worker sends.
 *
 * PAIRS (entries), MAX_WAITING (buffers of up to 64 KiB) and the OFFSET_* are given on the compiler's command line.
 */

#define TAG 7 /* the kernel's own bits of a socket's sk_user_data */

struct stream {
  u64 redirected; /* bytes */
  u64 end;        /* not 0: from here on user space reads it; BROKEN: it cannot, bytes are missing */
  u32 next;       /* the sequence number of the next byte, when there was a buffer */
  u32 has_begun;
};
#define OVER 1
#define BROKEN 2

struct sockets_table_t {
  u64 key;
  int leaf;
  void *(*lookup)(u64 *);
  int (*sk_redirect_hash)(void *, void *, u64);
  u32 max_entries;
  int flags;
};
/* Keys are cookies of the sockets that receive. */
__attribute__((section("maps/sockhash"))) struct sockets_table_t targets = {.max_entries = 2 * PAIRS};
__attribute__((section("maps/sockhash"))) struct sockets_table_t sources = {.max_entries = 2 * PAIRS};
BPF_F_TABLE("hash", u64, struct stream, streams, 2 * PAIRS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", u64, u64, ended, 2 * PAIRS, BPF_F_NO_PREALLOC); /* tells user space which streams are over */

/* By number: bcc looks the helper up in /proc/kallsyms, which shows it only with CAP_SYSLOG, and takes one that sockets'
 * programs may not call if it does not find it. */
static long (*read_kernel)(void *to, u32 size, const void *from) = (void *)BPF_FUNC_probe_read_kernel;

static long (*adjust_room)(void *skb, s32 bytes, u32 mode, u64 flags) = (void *)BPF_FUNC_skb_adjust_room;
#define MOST_CUT 4095 /* bytes a call */
#define MOST_CALLS 130 /* a buffer has 512 KiB at most */

static inline __attribute__((always_inline)) u32 read32(u64 at) {
  u32 value = 0;
  read_kernel(&value, sizeof(value), (void *)at);
  return value;
}

static inline __attribute__((always_inline)) u64 read64(u64 at) {
  u64 value = 0;
  read_kernel(&value, sizeof(value), (void *)at);
  return value;
}

/* How many buffers wait for a socket. */
static inline __attribute__((always_inline)) u32 waiting_for(struct bpf_sock *sink) {
  struct bpf_sock *spilled = sink; /* the verifier forbids arithmetic on the pointer, but not reading the stack */
  u64 sock = 0;
  read_kernel(&sock, sizeof(sock), &spilled);
  u64 psock = read64(sock + OFFSET_SOCK_USER_DATA) & ~(u64)TAG;
  u32 count = 0;
  read_kernel(&count, sizeof(count), (void *)(psock + OFFSET_PSOCK_QUEUE + OFFSET_QUEUE_LENGTH));
  return count;
}

/* How many of the first bytes of a buffer have come before. Who sends anew what has arrived in part sends all of it, and
 * the kernel leaves the whole in the queue (tcp_data_queue() in net/ipv4/tcp_input.c): a process that reads skips what it
 * had, by the numbers, but tcp_read_skb(), from which a program gets its buffers, does not. */
static inline __attribute__((always_inline)) u32 known_bytes(struct __sk_buff *skb, struct stream *stream) {
  struct __sk_buff *spilled = skb; /* as in waiting_for */
  u64 buffer = 0;
  read_kernel(&buffer, sizeof(buffer), &spilled);
  u32 first = read32(buffer + OFFSET_SKB_CB + OFFSET_CB_SEQ);
  if (!stream->has_begun) {
    struct bpf_sock *socket = READ(skb, sk);
    u64 sock = 0;
    read_kernel(&sock, sizeof(sock), &socket);
    stream->next = read32(sock + OFFSET_TCP_COPIED_SEQ); /* a process has read up to there */
    stream->has_begun = 1;
  }
  u32 known = stream->next - first;
  if ((s32)known <= 0)
    known = 0;
  stream->next = first + READ(skb, len);
  return known;
}

/* Take bytes away from the beginning of a buffer; whether that was possible. */
static inline __attribute__((always_inline)) int cut(struct __sk_buff *skb, u32 bytes) {
#pragma clang loop unroll(disable)
  for (u32 call = 0; call < MOST_CALLS && bytes; call++) {
    u32 part = bytes < MOST_CUT ? bytes : MOST_CUT;
    if (adjust_room(skb, -(s32)part, 0, 0))
      return 0;
    bytes -= part;
  }
  return !bytes;
}

int pass_on(struct __sk_buff *skb) {
  /* The end of the stream alone. User space sees that by itself, and sending nothing would break the other socket. */
  if (!READ(skb, len))
    return SK_DROP;
  u64 cookie = bpf_get_socket_cookie(skb);
  struct stream *stream = streams.lookup(&cookie);
  if (!stream)
    return SK_PASS;
  if (stream->end == BROKEN)
    return SK_DROP;
  u32 known = known_bytes(skb, stream);
  if (known && !cut(skb, known)) {
    u64 yes = 1;
    stream->end = BROKEN;
    ended.update(&cookie, &yes);
    return SK_DROP;
  }
  if (!READ(skb, len))
    return SK_DROP;
  if (stream->end)
    return SK_PASS;
  /* Nothing that waits is charged to the sender: without this, one that nobody reads would fill the memory. */
  struct bpf_sock *sink = targets.lookup(&cookie);
  u32 waiting = MAX_WAITING;
  if (sink) {
    waiting = waiting_for(sink);
    bpf_sk_release(sink);
  }
  if (waiting >= MAX_WAITING) {
    u64 yes = 1;
    if (!ended.update(&cookie, &yes)) {
      stream->end = OVER;
      return SK_PASS;
    }
  }
  stream->redirected += READ(skb, len);
  return targets.sk_redirect_hash(skb, &cookie, 0);
}

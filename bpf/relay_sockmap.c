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
  u64 is_over;    /* from here on user space reads it */
};

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

int pass_on(struct __sk_buff *skb) {
  /* The end of the stream alone. User space sees that by itself, and sending nothing would break the other socket. */
  if (!skb->len)
    return SK_DROP;
  u64 cookie = bpf_get_socket_cookie(skb);
  struct stream *stream = streams.lookup(&cookie);
  if (!stream || stream->is_over)
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
      stream->is_over = 1;
      return SK_PASS;
    }
  }
  stream->redirected += skb->len;
  return targets.sk_redirect_hash(skb, &cookie, 0);
}

// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* READ and WRITE: the only way to the fields of a program's context, and of the sockets that the kernel hands out.
 *
 * The kernel translates each of these accesses by its offset and size, and refuses what is not exactly one field
 * (is_valid_access and convert_ctx_access of struct bpf_verifier_ops). Compilers do not know that: they merge accesses to
 * neighbouring fields into one of eight bytes, narrow a read of which only some bits are needed, and let several branches
 * share one access at a computed address; each release does so in other places. They do not touch an instruction that
 * is written in assembler.
 */

#define OFFSET_OF(pointer, field) __builtin_offsetof(typeof(*(pointer)), field)

#define READ(from, field)                                                                                          \
  ({                                                                                                               \
    u64 _read;                                                                                                     \
    _Static_assert(sizeof((from)->field) == 4 || sizeof((from)->field) == 8, "the kernel has no such fields");     \
    if (sizeof((from)->field) == 8)                                                                                \
      asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(_read) : "r"(from), "i"(OFFSET_OF(from, field)));               \
    else                                                                                                           \
      asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(_read) : "r"(from), "i"(OFFSET_OF(from, field)));               \
    (typeof((from)->field))_read;                                                                                  \
  })

/* All fields that programs may write have four bytes. */
#define WRITE(into, field, value)                                                                                  \
  do {                                                                                                             \
    u64 _written = (u32)(value);                                                                                   \
    _Static_assert(sizeof((into)->field) == 4, "no field that can be written");                                    \
    asm volatile("*(u32 *)(%0 + %1) = %2" : : "r"(into), "i"(OFFSET_OF(into, field)), "r"(_written) : "memory");   \
  } while (0)

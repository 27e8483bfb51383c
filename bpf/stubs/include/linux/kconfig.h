/* Stands in for a kernel header: see bpf/README.md. */
#define CONFIG_BPF_SYSCALL 1

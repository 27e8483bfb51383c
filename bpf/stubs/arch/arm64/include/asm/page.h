/* Stands in for a kernel header: see bpf/README.md. */
#define PAGE_SIZE 4096

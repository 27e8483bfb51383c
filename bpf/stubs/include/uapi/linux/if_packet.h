/* Stands in for a kernel header: see bpf/README.md. */

"""What the eBPF engine and the sockmap of the relay share: bpf(2), BTF, and building the C programs in bpf/.

Imports `system` and `host`. Nothing here knows about policies.
"""

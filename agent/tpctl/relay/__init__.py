"""The small relay: a data plane that forwards redirected connections and DNS queries to where they were going.

Its rooms, each importing those before it: `loop`, `settings`, `connections`, `dns`, `figures`, `process`. Outside, they
import `system`, `spec`, `host`, `bpf` and the readers of `config`. No engine is imported here.
"""

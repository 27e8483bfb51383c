"""What the relay is told to do, from its file or flags: listeners, upstreams, TLS, access, limits.

Imports `loop`, and the readers of `tpctl.config`. Nothing here opens a socket.
"""

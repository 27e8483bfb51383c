"""Numbers for people and machines: metrics, the server that publishes them, and `tpctl top`.

Imports `loop`, `settings`, `connections` and `dns`. Nothing here changes what the relay does.
"""

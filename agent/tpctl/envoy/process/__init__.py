"""Running Envoy: one process that starts it, gives it its files, keeps them up to date, and restarts it.

Beside it, that process has a worker of the relay's, which answers DNS.

Part of the room `envoy`; the only part that imports the relay's `process`, for what both data planes do alike.
"""

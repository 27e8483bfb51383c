"""Running Envoy: one process that starts it, gives it its files, keeps them up to date, and restarts it.

Part of the room `envoy`; the only part that imports the relay's `process`, for what both data planes do alike.
"""

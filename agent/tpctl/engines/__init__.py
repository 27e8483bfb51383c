"""From a policy to kernel state and back: an engine plans, applies, inspects and removes.

Imports `system`, `spec`, `host` and `bpf`. What lies outside asks through `base.Engine` or `registry`; nothing here
decides what should happen to a connection.
"""

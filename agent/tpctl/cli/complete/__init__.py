"""What a shell completes: scripts for the shells, and candidates for values.

Imports `system`, `host` and `config`.
"""

"""The record of what is installed in this network namespace, and the lock for changing it, one tpctl at a time.

Imports `system`, `spec` and `host`. A record is a convenience: rules identify themselves without it.
"""

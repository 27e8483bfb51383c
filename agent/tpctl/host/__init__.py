"""Facts of this host, read and never changed: users, addresses, name servers, listeners, control groups, conntrack.

Imports `system` and `spec`. Nothing here writes anything.
"""

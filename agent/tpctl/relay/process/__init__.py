"""The processes: supervisor and workers, listening sockets, privileges, reload, handover, systemd.

Imports every other room of the relay.
"""

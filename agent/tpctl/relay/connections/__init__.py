"""A TCP connection from accept to its end: original destination, access, dialling, TLS, PROXY protocol, the pump.

Imports `loop` and `settings`. Nothing here knows DNS or other processes.
"""

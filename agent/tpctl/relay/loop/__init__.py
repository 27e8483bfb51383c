"""Events, timers and sockets as the kernel provides them: the loop, signals, addresses, sock_diag, ancillary data.

Imports no other room of the relay. Nothing here knows about settings or the purpose of a connection.
"""

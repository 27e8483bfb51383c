"""DNS: messages, the local zone, upstream name servers, over UDP and TCP.

Imports `loop`, `settings` and `connections`.
"""

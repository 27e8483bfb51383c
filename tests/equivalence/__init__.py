"""Every engine proven equal to `decide()`: random policies, random and directed connections, real sockets."""

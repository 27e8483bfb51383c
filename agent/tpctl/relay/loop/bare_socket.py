"""The sockets of connections: what `socket.socket` wraps in Python.

Making, asking and closing the wrapper costs some microseconds: it makes enumerations of numbers, and counts the files
that were made of it.
"""

from _socket import socket as Socket  # noqa: N812 - a class, whatever its name

__all__ = ["Socket"]

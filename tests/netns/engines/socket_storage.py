"""How many sockets hold something in a map of socket storage: its keys cannot be listed, but sock_diag(7) shows them.

No program is needed for that, which a kernel may refuse. Only sockets of the current network namespace are seen, and
what a socket held is freed with it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

_SOCK_DIAG, _BY_FAMILY = 4, 20
_REQUEST, _DUMP = 0x1, 0x300
_DONE, _ERROR = 3, 2
_WITH_STORAGE, _MAP_FD = 2, 1
"""INET_DIAG_REQ_SK_BPF_STORAGES and SK_DIAG_BPF_STORAGE_REQ_MAP_FD (linux/inet_diag.h, linux/sock_diag.h)."""
_STORAGE = 20
"""INET_DIAG_SK_BPF_STORAGES: what follows a socket that holds something in the map."""
_NESTED = 0x8000
_ALL_STATES = 0xFFFFFFFF
_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
_ABOUT = struct.Struct("=BBBBI48x")
"""struct inet_diag_req_v2, whose socket (struct inet_diag_sockid) a dump does not look at."""
_ANSWER_BYTES = 72
"""struct inet_diag_msg."""


def count(map_fd: int) -> int:
    """How many sockets of the current network namespace have an entry. Raises OSError."""
    pairs = ((family, kind) for family in (socket.AF_INET, socket.AF_INET6) for kind in (6, 17))
    return sum(_holds(answer) for family, protocol in pairs for answer in _dump(family, protocol, map_fd))


def _dump(family: int, protocol: int, map_fd: int) -> Iterator[bytes]:
    chosen = _attribute(_WITH_STORAGE | _NESTED, _attribute(_MAP_FD, struct.pack("=I", map_fd)))
    body = _ABOUT.pack(family, protocol, 0, 0, _ALL_STATES) + chosen
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as asking:
        asking.settimeout(60)
        asking.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST | _DUMP, 0, 0) + body)
        while True:
            for kind, content in _messages(asking.recv(1 << 20)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", content)[0], "sock_diag")
                yield content


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def _attribute(kind: int, content: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content


def _holds(answer: bytes) -> bool:
    at = _ANSWER_BYTES
    while at < len(answer):
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        if kind & ~_NESTED == _STORAGE:
            return bool(length > _ATTRIBUTE.size)
        at += (length + 3) & ~3
    return False

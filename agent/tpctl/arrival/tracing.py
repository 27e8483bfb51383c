"""What nf_tables does with single packets: nftables' own trace (nft(8), "nftrace"), by netlink.

The rules that turn it on are in a table that belongs to a socket (NFT_TABLE_F_OWNER, Linux 5.12): the kernel removes it
when the socket is closed, however the process ends, and nobody else can change it. Messages are those of
linux/netfilter/nf_tables.h; `nft monitor trace` would have to be waited for until it has read the whole ruleset.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from tpctl.engines.presence import TRACE_TABLE
from tpctl.spec.policy import Address, Family
from tpctl.system import netlink

_NFGEN = struct.Struct(">BBH")
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NFTABLES = 10
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE, _TRACE = 0, 3, 6, 17
_APPEND = 0x800
"""NLM_F_APPEND (linux/netlink.h)."""
_SOL_NETLINK, _ADD_MEMBERSHIP, _TRACE_GROUP = 270, 1, 9
_OWNER = 0x2
_NFPROTO = {Family.IPV4: 2, Family.IPV6: 10}
_VERSIONS = {number: int(family) for family, number in _NFPROTO.items()}
_NAMES = {2: "ip", 10: "ip6", 1: "inet"}
_HOOKS = {"prerouting": 0, "output": 3, "postrouting": 4}
_FIRST_PRIORITY, _LAST_PRIORITY = -350, 1000
_ADDRESSES = {Family.IPV4: (12, 16, 4), Family.IPV6: (8, 24, 16)}
"""In the header: where source and destination stand, and their length."""
_META_NFTRACE = 12
_REGISTER = 1
_DROP, _ACCEPT, _JUMP, _GOTO = 0, 1, -3, -4
_BY_POLICY, _BY_RULE = 1, 3
_BUFFER_BYTES = 1 << 20
_RCVBUFFORCE = 33
"""SO_RCVBUFFORCE, asm-generic/socket.h."""


class NoTraceError(Exception):
    """The kernel does not let us trace."""


@dataclass(frozen=True, slots=True)
class Event:
    """A rule that a packet has met, or the policy at the end of a base chain."""

    packet: int
    """The kernel's number for it; each time that a packet passes the first traced chain it gets one."""
    family: str
    """Of the table."""
    version: int
    """Of IP."""
    table: str
    chain: str
    handle: int
    """Of the rule; 0 for a policy."""
    verdict: int
    called: str
    """The chain that the rule jumps to."""
    ports: tuple[int, int]
    """Source and destination."""
    out_interface: int

    @property
    def is_drop(self) -> bool:
        """Whether the packet ends here."""
        return self.verdict == _DROP

    @property
    def is_call(self) -> bool:
        """Whether it goes on in another chain."""
        return self.verdict in (_JUMP, _GOTO)


class Trace:
    """While it is open, packets from and to some addresses are traced. A context manager."""

    def __init__(self, family: Family, addresses: Iterable[Address]) -> None:
        """Raises NoTraceError."""
        self.table = f"{TRACE_TABLE}_{os.getpid()}"
        self._ports: dict[int, tuple[int, int]] = {}
        self._outs: dict[int, int] = {}
        try:
            self._heard = _socket()
            self._owner = _socket()
            self._heard.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _TRACE_GROUP)
            with contextlib.suppress(OSError):
                self._heard.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER_BYTES)
            self._begin(family, tuple(addresses))
        except OSError as error:
            self.close()
            raise NoTraceError(error.strerror) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """With its socket the table goes."""
        for name in ("_owner", "_heard"):
            if held := getattr(self, name, None):
                held.close()

    def events(self) -> Iterator[Event]:
        """What has been traced up to now."""
        self._heard.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    received = self._heard.recv(1 << 16)
                except OSError as error:
                    if error.errno == errno.ENOBUFS:  # some were lost; the others tell enough
                        continue
                    raise
                for _, kind, body in netlink.messages(received):
                    if kind == (_NFTABLES << 8 | _TRACE) and (event := self._event(body)):
                        yield event

    def _begin(self, family: Family, addresses: tuple[Address, ...]) -> None:
        proto = _NFPROTO[family]
        table = {1: _text(self.table), 2: _number(_OWNER)}
        batch = [_message(_BATCH_BEGIN, 0, _NFTABLES, b""), _message(_NEW_TABLE, proto, 0, netlink.attributes(table))]
        for hook, number in _HOOKS.items():
            priority = _LAST_PRIORITY if hook == "postrouting" else _FIRST_PRIORITY
            at: dict[int, netlink.Value] = {1: _number(number), 2: _number(priority)}
            chain: dict[int, netlink.Value] = {1: _text(self.table), 3: _text(hook), 4: at, 7: _text("filter")}
            batch.append(_message(_NEW_CHAIN, proto, 0, netlink.attributes(chain)))
            for address in addresses:
                for offset in _ADDRESSES[family][:2]:
                    rule: dict[int, netlink.Value] = {1: _text(self.table), 2: _text(hook)}
                    body = netlink.attributes(rule) + _nested(4, _expressions(offset, address))
                    batch.append(_message(_NEW_RULE, proto, 0, body))
        batch.append(_message(_BATCH_END, 0, _NFTABLES, b""))
        self._owner.settimeout(netlink.WAIT_SECONDS)
        self._owner.send(b"".join(batch))
        self._await(len(batch) - 2)

    def _await(self, wanted: int) -> None:
        """Each message of the batch is acknowledged once it is carried out, or the first that is refused."""
        deadline = time.monotonic() + netlink.WAIT_SECONDS
        while wanted > 0 and time.monotonic() < deadline:
            for _, kind, body in netlink.messages(self._owner.recv(1 << 16)):
                if kind == netlink.ERROR:
                    netlink.raise_if_refused(body)
                    wanted -= 1

    def _event(self, body: bytes) -> Event | None:
        found = netlink.parse(body[4:])
        number = _read(found.get(6))
        if 9 in found and len(found[9]) >= 4:  # headers come with the first event of a hook only
            self._ports[number] = struct.unpack_from(">HH", found[9])
        if 12 in found:
            self._outs[number] = _read(found[12])
        kind = _read(found.get(4))
        if kind == _BY_RULE:
            verdict = netlink.parse(found.get(5, b""))
            code = struct.unpack(">i", verdict[1])[0] if 1 in verdict else _ACCEPT
            called = verdict.get(2, b"").rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == _BY_POLICY:
            code, called = _read(found.get(16), _ACCEPT), ""
        else:
            return None
        return Event(
            number,
            _NAMES.get(body[0], str(body[0])),
            _VERSIONS.get(_read(found.get(15)), 0),
            _string(found.get(1)),
            _string(found.get(2)),
            struct.unpack(">Q", found[3])[0] if 3 in found and kind == _BY_RULE else 0,
            code,
            called,
            self._ports.get(number, (0, 0)),
            self._outs.get(number, 0),
        )


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, netlink.NETFILTER)
    made.bind((0, 0))
    return made


def _message(kind: int, proto: int, resource: int, body: bytes) -> bytes:
    flags = 0
    if kind not in (_BATCH_BEGIN, _BATCH_END):
        flags = netlink.ACK | netlink.CREATE | (_APPEND if kind == _NEW_RULE else 0)
        kind |= _NFTABLES << 8
    return netlink.message(kind, _NFGEN.pack(proto, 0, resource) + body, flags, 1)


def _expressions(offset: int, address: Address) -> bytes:
    """`ip saddr ADDRESS meta nftrace set 1`, as the kernel's expressions."""
    size = len(address.packed)
    return b"".join(
        (
            _expression("payload", {1: _number(_REGISTER), 2: _number(1), 3: _number(offset), 4: _number(size)}),
            _expression("cmp", {1: _number(_REGISTER), 2: _number(0), 3: {1: address.packed}}),
            _expression("immediate", {1: _number(_REGISTER), 2: {1: b"\1"}}),
            _expression("meta", {2: _number(_META_NFTRACE), 3: _number(_REGISTER)}),
        )
    )


def _expression(name: str, content: dict[int, netlink.Value]) -> bytes:
    return netlink.attributes({1: {1: _text(name), 2: content}})


def _nested(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind | 0x8000) + content


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _number(value: int) -> bytes:
    return struct.pack(">i", value)


def _read(value: bytes | None, otherwise: int = 0) -> int:
    return int(struct.unpack(">I", value)[0]) if value and len(value) == 4 else otherwise


def _string(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode(errors="surrogateescape")

"""Where a listener is reached, written as in the `listen` directive of nginx and the `*_listen` settings of Kong.

    ADDRESS:PORT [transparent] [proxy_protocol] [ssl] [reuseport] [bind] [deferred]
                 [backlog=N] [ipv6only=on|off] [so_keepalive=on|off|IDLE:INTERVAL:COUNT]

The words mean what they mean there (nginx.org, ngx_stream_core_module). Pure.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, ip_address
from pathlib import PurePosixPath
from typing import Any

from tpctl.config.sources import did_you_mean
from tpctl.config.values import BadValueError, quoted, read_port, shown, whole_number
from tpctl.relay.loop.original_destination import Destination

BACKLOG = 4096
"""The kernel cuts it to net.core.somaxconn."""
MAX_BACKLOG = 2**31 - 1
PROBES = 4
"""Probes during a silence that somebody between would take for the end."""
_UNANSWERED_SECONDS = 600
"""The kernel's own patience is like that (tcp(7): 9 probes, 75 s each)."""
MAX_KEEPALIVE = {"idle": 32767, "interval": 32767, "count": 127}
"""net/ipv4/tcp.c: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT."""
MAX_UNIX_PATH = 107
"""sockaddr_un.sun_path, without the terminating zero."""
ADDRESS_SHAPE = "write ADDRESS:PORT, as in 127.0.0.1:15006, [::]:15006 or *:15006, or unix:/PATH"
_KEEPALIVE_SHAPE = "write on, off, or IDLE:INTERVAL:COUNT, as in 30m::10"
_TIME = re.compile(r"(\d{1,9})([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}

Address = Destination | PurePosixPath
"""An address and port, or the path of a unix socket."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """TCP keep-alive of accepted connections (tcp(7)); None leaves a value to the kernel."""

    on: bool
    idle: int | None = None
    """Seconds until the first probe."""
    interval: int | None = None
    """Seconds between probes."""
    count: int | None = None


def keepalive_within(silence: int) -> Keepalive:
    """Probes often enough for whoever forgets a connection after so many seconds of silence."""
    interval = min(max(silence // PROBES, 1), MAX_KEEPALIVE["interval"])
    count = min(max(_UNANSWERED_SECONDS // interval, 1), MAX_KEEPALIVE["count"])
    return Keepalive(True, interval, interval, count)


@dataclass(frozen=True, slots=True)
class Listen:
    """One listening address and how its socket is made."""

    address: Address
    transparent: bool = False
    """Accept connections to addresses this host does not have (IP_TRANSPARENT), as TPROXY delivers them."""
    proxy_protocol: bool = False
    """Every connection begins with a PROXY protocol header."""
    ssl: bool = False
    """Terminate TLS."""
    reuseport: bool = False
    """A socket a worker instead of one that all share."""
    bind: bool = False
    """A bind() of its own; here every listener has one, so this changes nothing."""
    deferred: bool = False
    """Wake up when the client has said something (TCP_DEFER_ACCEPT)."""
    backlog: int = BACKLOG
    ipv6only: bool = True
    keepalive: Keepalive | None = None
    """None leaves it as it is."""

    @property
    def is_wildcard(self) -> bool:
        """Whether all of the host's addresses lead here."""
        return isinstance(self.address, Destination) and ip_address(self.address.host).is_unspecified

    @property
    def port(self) -> int | None:
        """The TCP or UDP port; None for a unix socket."""
        return self.address.port if isinstance(self.address, Destination) else None

    def overlaps(self, other: Listen) -> bool:
        """Whether a connection could be meant for either."""
        mine, theirs = self.address, other.address
        if not isinstance(mine, Destination) or not isinstance(theirs, Destination):
            return mine == theirs
        if mine.port != theirs.port:
            return False
        if mine.family != theirs.family:
            dual = self if mine.family == socket.AF_INET6 else other
            return dual.is_wildcard and not dual.ipv6only
        return mine.host == theirs.host or self.is_wildcard or other.is_wildcard


def show(address: Address) -> str:
    """An address as it is written in the configuration."""
    return str(address) if isinstance(address, Destination) else f"unix:{address}"


def read_address(value: object) -> Address:
    """`127.0.0.1:80`, `[::1]:80`, `*:80` (every IPv4 address) or `unix:/path`. Raises BadValueError."""
    text = value.strip() if isinstance(value, str) else ""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or len(path.encode()) > MAX_UNIX_PATH or "\0" in path:
            raise BadValueError(f"{quoted(value)} is not unix: and an absolute path of at most {MAX_UNIX_PATH} bytes")
        return PurePosixPath(path)
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = "0.0.0.0" if host == "*" else host[1:-1] if bracketed else host
    try:
        parsed = ip_address(host)
    except ValueError:
        raise BadValueError(f"{quoted(value)} is not an address; {ADDRESS_SHAPE}") from None
    if not colon or bracketed != (parsed.version == 6) or "%" in host:
        raise BadValueError(f"{quoted(value)} is not an address; {ADDRESS_SHAPE}")
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        raise BadValueError(f"{quoted(value)} is an IPv4 address; write {parsed.ipv4_mapped}:{shown(port)}")
    try:
        number = read_port(port, lambda _note: None)
    except BadValueError as bad:
        raise BadValueError(f"{quoted(value)}: {bad}") from None
    return Destination(str(parsed), number, socket.AF_INET6 if parsed.version == 6 else socket.AF_INET)


def read_listen(value: object) -> Listen:
    """A listening address with its options. Raises BadValueError with every problem."""
    words = value.split() if isinstance(value, str) else []
    if not words:
        raise BadValueError(f"{quoted(value)} is not an address; {ADDRESS_SHAPE}")
    reading = _Reading(words)
    if reading.problems:
        raise BadValueError(reading.problems)
    assert reading.listen is not None
    return reading.listen


@dataclass(slots=True)
class _Reading:
    """The words of one listener, read one after the other."""

    words: list[str]
    listen: Listen | None = None
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            address = read_address(self.words[0])
        except BadValueError as bad:
            self.problems += bad.problems
            address = Destination("0.0.0.0", 1)
        self.listen = Listen(address)
        names = [word.partition("=")[0] for word in self.words[1:]]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            self.problems.append(f"{name} is given twice")
        for word in self.words[1:]:
            try:
                self.listen = replace(self.listen, **_option(word))
            except BadValueError as bad:
                self.problems += bad.problems
        self._fit(names, address)

    def _fit(self, names: list[str], address: Address) -> None:
        """Options that cannot be had at this address."""
        if isinstance(address, PurePosixPath):
            for name in names:
                if name in _TCP_ONLY:
                    self.problems.append(f"{name} is not possible on a unix socket")
        elif "ipv6only" in names and address.family != socket.AF_INET6:
            self.problems.append(f"ipv6only is not possible on the IPv4 address {address.host}; write [::]")


_FLAGS = ("transparent", "proxy_protocol", "ssl", "reuseport", "bind", "deferred")
_TCP_ONLY = frozenset({"transparent", "reuseport", "deferred", "ipv6only", "so_keepalive"})


def _option(word: str) -> dict[str, Any]:
    name, equals, text = word.partition("=")
    if name in _FLAGS:
        if equals:
            raise BadValueError(f"{word}: {name} takes no value")
        return {name: True}
    if name in _VALUES:
        if not equals:
            raise BadValueError(f"{word}: {name} needs a value")
        return _VALUES[name](text)
    raise BadValueError(f"{quoted(word)} is not an option of a listener{did_you_mean(name, (*_FLAGS, *_VALUES))}")


def _backlog(text: str) -> dict[str, Any]:
    number = whole_number(text)
    if number is None or not 1 <= number <= MAX_BACKLOG:
        raise BadValueError(f"backlog={text} is not a whole number from 1 to {MAX_BACKLOG}")
    return {"backlog": number}


def _ipv6only(text: str) -> dict[str, Any]:
    if text not in ("on", "off"):
        raise BadValueError(f"ipv6only={text} is neither on nor off")
    return {"ipv6only": text == "on"}


def _keepalive(text: str) -> dict[str, Any]:
    if text in ("on", "off"):
        return {"keepalive": Keepalive(text == "on")}
    parts = text.split(":")
    if len(parts) != 3 or not any(parts):
        raise BadValueError(f"so_keepalive={text}: {_KEEPALIVE_SHAPE}")
    values: dict[str, int | None] = {}
    for name, part in zip(("idle", "interval", "count"), parts, strict=True):
        found = _TIME.fullmatch(part) if name != "count" else re.fullmatch(r"(\d{1,9})()", part)
        number = int(found[1]) * _SECONDS[found[2]] if found else 0
        if part and not 1 <= number <= MAX_KEEPALIVE[name]:
            limit = MAX_KEEPALIVE[name]
            raise BadValueError(f"so_keepalive={text}: {name} is not within 1-{limit}; {_KEEPALIVE_SHAPE}")
        values[name] = number if part else None
    return {"keepalive": Keepalive(True, **values)}


_VALUES: dict[str, Callable[[str], dict[str, Any]]] = {
    "backlog": _backlog,
    "ipv6only": _ipv6only,
    "so_keepalive": _keepalive,
}

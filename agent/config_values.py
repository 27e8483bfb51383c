"""Readers of single configuration values: from what YAML, a variable or a flag holds to a value of the policy.

Every reader takes the raw value and a function to note what was changed about it, and raises `BadValueError` with a
line for each thing that is wrong. None of them knows where the value came from; `agent.config` adds that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv6Network, ip_network
from typing import TypeVar

from agent.policy import (
    ALL_PORTS,
    MAX_PORT,
    MAX_UID,
    Network,
    PortRange,
    Ports,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

Note = Callable[[str], None]
Reader = Callable[[object, Note], object]
T = TypeVar("T")

TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
"""The spellings of Go's strconv.ParseBool, which kumactl's flags and variables use."""

EXECUTABLES = tuple(f"{tool}{suffix}" for tool in ("iptables", "ip6tables") for suffix in ("", "-save", "-restore"))
MAX_INTERFACE_NAME = 15
"""IFNAMSIZ (net/if.h) without the terminating zero."""

MAX_SHOWN = 160
"""Characters of a value in a message."""

_NANOSECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_LONGEST = 2**63 - 1
"""Nanoseconds of Go's time.Duration, and of what time.sleep takes."""
_SUSPICIOUSLY_SHORT_NANOSECONDS = 10**6


class BadValueError(ValueError):
    """A value that cannot be read; `problems` has one line each."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


def quoted(value: object) -> str:
    """A value as it stands in a message."""
    return f'"{shown(value)}"' if isinstance(value, str) else shown(repr(value))


def shown(text: str) -> str:
    """A text of somebody else's on one line of a message: nothing a terminal would obey, and not without an end."""
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"
    return short if short.isprintable() else short.encode("unicode_escape").decode("ascii")


def read_bool(value: object, note: Note) -> bool:
    """A truth value, in the spellings of YAML and of Go."""
    if isinstance(value, bool):
        return value
    text = value.strip() if isinstance(value, str) else None
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise BadValueError(f"{quoted(value)} is neither true nor false")


def read_text(value: object, note: Note) -> str:
    """A string; a number is taken as its digits, so that a uid needs no quotes in YAML."""
    if isinstance(value, str) and value.strip().isprintable():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise BadValueError(f"{quoted(value)} is not a string")


def read_path(value: object, note: Note) -> str:
    """The path of a file."""
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise BadValueError(f"{quoted(value)} is not the path of a file")


def read_cgroup(value: object, note: Note) -> str:
    """A control group's path from the root of the hierarchy, or "" for none.

    That of its directory under /sys/fs/cgroup will do too.
    """
    if value == "":
        return ""
    text = value.strip() if isinstance(value, str) else ""
    path = text.removeprefix("/sys/fs/cgroup").strip("/")
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or not path.isprintable() or '"' in path:
        raise BadValueError(f"{quoted(value)} is not the path of a control group, such as system.slice/app.service")
    return path


def whole_number(value: object) -> int | None:
    """The number `value` is or spells in plain decimal digits, or None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value.strip()):
        return int(value.strip())
    return None


def number(low: int, high: int) -> Reader:
    """A reader of whole numbers from `low` to `high`, both included."""

    def read(value: object, note: Note) -> int:
        result = whole_number(value)
        if result is None or not low <= result <= high:
            raise BadValueError(f"{quoted(value)} is not a whole number from {low} to {high}")
        return result

    return read


def choice(*allowed: str) -> Reader:
    """A reader of one of a few words, whatever their case."""

    def read(value: object, note: Note) -> str:
        if isinstance(value, str) and value.strip().lower() in allowed:
            return value.strip().lower()
        raise BadValueError(f"{quoted(value)} is none of {', '.join(allowed)}")

    return read


def read_port(value: object, note: Note) -> int:
    """One TCP or UDP port."""
    result = whole_number(value)
    if result is None or not 1 <= result <= MAX_PORT:
        raise BadValueError(f"{quoted(value)} is not a port (1-{MAX_PORT})")
    return result


def read_duration(value: object, note: Note) -> float:
    """A time in seconds, from Go's notation ("2s", "1m30s", "500ms") or, as kumactl takes it, nanoseconds."""
    text = value.strip().strip('"') if isinstance(value, str) else value
    nanoseconds = whole_number(text)
    if nanoseconds is not None:
        if 0 < nanoseconds < _SUSPICIOUSLY_SHORT_NANOSECONDS:
            note(f"{nanoseconds} is taken as nanoseconds, as by kumactl; for seconds write {nanoseconds}s")
        if 0 <= nanoseconds <= _LONGEST:
            return nanoseconds / 10**9
    if isinstance(text, str) and text and not _DURATION_PART.sub("", text):
        length = sum(float(part) * _NANOSECONDS[unit] for part, unit in _DURATION_PART.findall(text))
        if length <= _LONGEST:
            return length / 10**9
        raise BadValueError(f"{quoted(value)} is longer than 292 years")
    raise BadValueError(f"{quoted(value)} is not a duration such as 2s, 500ms or 1m")


def read_ports(value: object, note: Note) -> Ports:
    """Ports and port ranges: a list, or a text with commas."""
    return _each(_items(value), read_port_range, note)


def read_port_range(value: object, note: Note) -> PortRange:
    """`80` or `1000-2000`."""
    first, dash, last = value.partition("-") if isinstance(value, str) else (value, "", value)
    low, high = whole_number(first), whole_number(last if dash else first)
    if low is None or high is None:
        raise BadValueError(f"{quoted(value)} is not a port (1-{MAX_PORT}) or a range such as 1000-2000")
    if not (1 <= low <= MAX_PORT and 1 <= high <= MAX_PORT):
        raise BadValueError(f"{quoted(value)} is not within the ports 1-{MAX_PORT}")
    if low > high:
        raise BadValueError(f"the range {low}-{high} is reversed; write {high}-{low}")
    return PortRange(low, high)


def read_networks(value: object, note: Note) -> tuple[Network, ...]:
    """Addresses and CIDR networks of either family: a list, or a text with commas."""
    return _each(_items(value), read_network, note)


def read_network(value: object, note: Note) -> Network:
    """`10.0.0.0/8`, `fd00::/8`, or an address, which stands for itself alone. Host bits are cleared, with a note."""
    text = value.strip() if isinstance(value, str) else ""
    address, slash, prefix = text.partition("/")
    if not text or "%" in text or (slash and whole_number(prefix) is None):
        raise BadValueError(f"{quoted(value)} is not an IP address or a network such as 10.0.0.0/8 or fd00::/8")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise BadValueError(
            f"{quoted(value)} is not an IP address or a network such as 10.0.0.0/8 or fd00::/8"
        ) from None
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
        plain = network.network_address.ipv4_mapped
        length = f"/{network.prefixlen - 96}" if slash else ""
        raise BadValueError(f"{quoted(value)} is an IPv4 address written as IPv6; write {plain}{length}")
    if ip_network(address).network_address != network.network_address:
        note(f"{text} has host bits set; taken as {network}")
    return network


def is_interface_name(text: str) -> bool:
    """Whether an interface may be called so."""
    return _is_named(text) and len(text.encode()) <= MAX_INTERFACE_NAME


def _is_named(name: str) -> bool:
    """The same without a limit; neither the kernel nor the rules of any engine give these characters a meaning."""
    return bool(name) and name not in (".", "..") and not re.search(r"[\s/+!\"'\\]", name) and name.isprintable()


def read_virtual_networks(value: object, note: Note) -> tuple[VirtualNetwork, ...]:
    """Virtual networks: a list, or a text with commas."""
    return _each(_items(value), read_virtual_network, note)


def read_virtual_network(value: object, note: Note) -> VirtualNetwork:
    """`docker0:172.17.0.0/16`, `br+:172.18.0.0/16` or `docker0:fd00::/64`."""
    shape = "write INTERFACE[+]:CIDR, as in docker0:172.17.0.0/16"
    interface, colon, cidr = value.partition(":") if isinstance(value, str) else ("", "", "")
    interface = interface.strip()
    if not colon or not cidr.strip():
        raise BadValueError(f"{quoted(value)} is not a virtual network; {shape}")
    if not _is_named(interface.removesuffix("+")):
        raise BadValueError(f"{quoted(value)} does not begin with the name of an interface; {shape}")
    if len(interface.encode()) > MAX_INTERFACE_NAME:
        raise BadValueError(f"{quoted(value)}: the interface name is longer than {MAX_INTERFACE_NAME} characters")
    try:
        return VirtualNetwork(interface, read_network(cidr.strip(), note))
    except BadValueError as bad:
        raise BadValueError(f"{quoted(value)}: {problem}" for problem in bad.problems) from None


def read_uid_exclusions(value: object, note: Note) -> tuple[UidExclusion, ...]:
    """Exclusions by user: a list, or a text with `;` or white space between them (a comma is part of one)."""
    items = [item for item in re.split(r"[;\s]+", value) if item] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        items = [items]
    return tuple(rule for rules in _each(items, read_uid_exclusion, note) for rule in rules)


def read_uid_exclusion(value: object, note: Note) -> tuple[UidExclusion, ...]:
    """`[protocols:][ports:]uids`; one exclusion a protocol, TCP first."""
    if whole_number(value) is None and (not isinstance(value, str) or not value.strip()):
        raise BadValueError(f"{quoted(value)} is not an exclusion; write [PROTOCOLS:][PORTS:]UIDS, as in udp:53:1000")
    parts = str(value).strip().split(":")
    if len(parts) > 3:
        raise BadValueError(f"{quoted(value)} has too many parts; write [PROTOCOLS:][PORTS:]UIDS, as in udp:53:1000")
    protocols, ports, uids = ["*"] * (3 - len(parts)) + parts
    try:
        return tuple(
            UidExclusion(protocol, _exclusion_ports(ports, note), _exclusion_uids(uids))
            for protocol in _exclusion_protocols(protocols)
        )
    except BadValueError as bad:
        raise BadValueError(f"{quoted(value)}: {problem}" for problem in bad.problems) from None


def _exclusion_protocols(text: str) -> tuple[Protocol, ...]:
    if text.strip() in ("", "*"):
        return tuple(Protocol)
    words = [word.strip().lower() for word in text.split(",")]
    unknown = [word for word in words if word not in tuple(Protocol)]
    if unknown:
        raise BadValueError(f"{quoted(word)} is no protocol; use tcp, udp, or * for both" for word in unknown)
    return tuple(protocol for protocol in Protocol if protocol in words)


def _exclusion_ports(text: str, note: Note) -> Ports:
    if text.strip() in tuple(Protocol):
        raise BadValueError(f"{quoted(text)} stands where the ports belong; write {text.strip()}:*:UIDS")
    return (ALL_PORTS,) if text.strip() in ("", "*") else read_ports(text, note)


def _exclusion_uids(text: str) -> UidRange:
    if text.strip() == "*":
        raise BadValueError(f"* is not possible for uids, it would exclude everything; use a range such as 0-{MAX_UID}")
    first, dash, last = text.strip().partition("-")
    low, high = whole_number(first), whole_number(last if dash else first)
    if low is None or high is None:
        raise BadValueError(f"{quoted(text)} is not a uid or a range of uids such as 1000-1999")
    if low > MAX_UID or high > MAX_UID:
        raise BadValueError(f"{quoted(text)} is not within the uids 0-{MAX_UID}")
    if low > high:
        raise BadValueError(f"the range {low}-{high} is reversed; write {high}-{low}")
    return UidRange(low, high)


def read_executables(value: object, note: Note) -> dict[str, str]:
    """Paths of the iptables programs: a mapping, or a text `iptables:/path,iptables-save:/path,...`."""
    pairs: list[tuple[object, object]] = []
    values = isinstance(value, Mapping)
    if isinstance(value, Mapping):
        pairs.extend(value.items())
    else:
        pairs.extend((name, path) for name, _, path in (str(item).partition(":") for item in _items(value)))
    problems = []
    for name, path in pairs:
        if name not in EXECUTABLES:
            problems.append(f"{quoted(name)} is none of {', '.join(EXECUTABLES)}")
        elif not isinstance(path, str | None) or not (path or "").isprintable() or (path, values) == ("", False):
            problems.append(f"{name}: {quoted(path)} is not the path of a program")
    if problems:
        raise BadValueError(problems)
    return {str(name): str(path) for name, path in pairs if path}


def read_variables(value: object, note: Note) -> dict[str, str]:
    """Names and values: a mapping, or texts `name=value`."""
    if isinstance(value, Mapping):
        return {str(name): str(one) for name, one in value.items()}
    found: dict[str, str] = {}
    for item in _items(value):
        name, equals, text = str(item).partition("=")
        if not name.strip() or not equals:
            raise BadValueError(f"{quoted(item)} is not NAME=VALUE")
        found[name.strip()] = text
    return found


def _items(value: object) -> list[object]:
    """The items of a list value; texts are split at commas. An empty text is an empty list, an empty item an error."""
    items: list[object] = []
    if isinstance(value, str) and not value.strip():
        return items
    for entry in value if isinstance(value, list | tuple) else [value]:
        parts = [part.strip() for part in entry.split(",")] if isinstance(entry, str) else [entry]
        if "" in parts:
            raise BadValueError(f"{quoted(entry)} has an empty item")
        items.extend(parts)
    return items


def _each(items: Iterable[object], read: Callable[[object, Note], T], note: Note) -> tuple[T, ...]:
    """Every item read and in order, without repetitions; all problems together."""
    results: dict[T, None] = {}
    problems: list[str] = []
    for item in items:
        try:
            results[read(item, note)] = None
        except BadValueError as bad:
            problems.extend(bad.problems)
    if problems:
        raise BadValueError(problems)
    return tuple(results)

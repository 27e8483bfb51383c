"""Reads the local zone from a file: YAML, or as hosts(5)."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from tpctl.config.values import BadValueError, shown, whole_number
from tpctl.config.yaml_text import parse_yaml
from tpctl.relay.dns.vips import ANY_PORT, Upstreams, Vips
from tpctl.relay.dns.zone import DEFAULT_TTL, Addresses, Zone
from tpctl.relay.loop.original_destination import Destination, unmapped
from tpctl.spec.policy import MAX_PORT
from tpctl.system.errors import InputError
from tpctl.system.input_files import UnusableFileError, read_text

MAX_FILE_SIZE = 16 * 1024 * 1024
"""Octets; such a file has some 300 000 names. Read whole, so it must have an end."""
MAX_TTL = 2**31 - 1
"""RFC 2181, 8."""
_YAML_SUFFIXES = (".yaml", ".yml")
_KEYS = ("ttl", "names")
_NAME_KEYS = ("addresses", "upstreams")


def wire_name(text: str) -> bytes:
    """A domain name in wire form, in lower case. Raises BadValueError."""
    import dns.exception
    import dns.name

    try:
        name = dns.name.from_text(text).to_wire()
    except (dns.exception.DNSException, UnicodeError) as error:
        raise BadValueError(f"{shown(repr(text))} is not a domain name: {error}") from None
    assert name is not None
    return name.lower()


def read_zone_file(path: Path, zone: str) -> Zone:
    """The zone called `zone` as the file has it. Raises InputError with every problem."""
    try:
        text = read_text(path, MAX_FILE_SIZE)
    except UnusableFileError as error:
        raise InputError(f"DNS zone file {path}: {error}") from error
    try:
        return parse_yaml_zone(text, zone) if path.suffix in _YAML_SUFFIXES else parse_hosts(text, zone)
    except BadValueError as bad:
        raise InputError([f"DNS zone file {path}: {problem}" for problem in bad.problems]) from None


def parse_hosts(text: str, zone: str) -> Zone:
    """A zone from the lines of a hosts(5) file: an address and the names it belongs to. Raises BadValueError."""
    reading = _Reading(zone)
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) == 1:
            reading.problems.append(f"line {number}: {shown(words[0])} has no name")
        for word in words[1:]:
            with reading.at(f"line {number}"):
                reading.add(reading.name(word), [_host(words[0])])
    return reading.zone(DEFAULT_TTL)


def parse_yaml_zone(text: str, zone: str) -> Zone:
    """A zone from YAML (docs/relay.md has the form). Raises BadValueError."""
    try:
        tree = parse_yaml(text)
    except UnusableFileError as error:
        raise BadValueError(str(error)) from None
    reading = _Reading(zone)
    ttl = DEFAULT_TTL
    with reading.at("the file"):
        tree = _mapping({} if tree is None else tree, _KEYS)
        if "ttl" in tree:
            with reading.at("ttl"):
                ttl = _ttl(tree["ttl"])
        with reading.at("names"):
            for key, value in _mapping({} if tree.get("names") is None else tree["names"]).items():
                with reading.at(f"names: {shown(str(key))}"):
                    _read_name(reading, reading.name(str(key)), value)
    return reading.zone(ttl)


def _read_name(reading: _Reading, name: bytes, value: object) -> None:
    """One name of a YAML file: its addresses, or a mapping that has them and their upstreams."""
    upstreams: Upstreams | None = None
    addresses = value
    if isinstance(value, Mapping):
        tree = _mapping(value, _NAME_KEYS)
        addresses = tree.get("addresses")
        if "upstreams" in tree:
            upstreams = _upstreams(tree["upstreams"])
    hosts = [_host(each) for each in _list(addresses)]
    if not hosts:
        raise BadValueError("has no addresses")
    reading.add(name, hosts)
    if upstreams is not None:
        for host in hosts:
            reading.add_vip(host, upstreams)


class _Reading:
    """What has been read of a file, and what is wrong with it."""

    def __init__(self, zone: str) -> None:
        self._zone = Zone(wire_name(zone), {})
        self._text = zone
        self._names: dict[bytes, Addresses] = {}
        self._vips: dict[str, Upstreams] = {}
        self.problems: list[str] = []

    def at(self, where: str) -> _Collector:
        """A block in which a BadValueError becomes a problem of that place."""
        return _Collector(self.problems, where)

    def name(self, text: str) -> bytes:
        """A name of the zone. Raises BadValueError."""
        name = wire_name(text)
        if not self._zone.covers(name):
            raise BadValueError(f"{shown(text)} is not a name in the zone {self._text}")
        return name

    def add(self, name: bytes, hosts: list[str]) -> None:
        """More addresses of a name."""
        known = self._names.get(name, Addresses())
        v4 = dict.fromkeys((*known.v4, *(host for host in hosts if ":" not in host)))
        v6 = dict.fromkeys((*known.v6, *(host for host in hosts if ":" in host)))
        self._names[name] = Addresses(tuple(v4), tuple(v6))

    def add_vip(self, host: str, upstreams: Upstreams) -> None:
        """Where connections to an address go. Raises BadValueError."""
        address = ip_address(host)
        if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local:
            raise BadValueError(f"connections to {host} never reach the relay; choose another virtual address")
        known = self._vips.get(host, {})
        for port in known.keys() & upstreams.keys():
            if known[port] != upstreams[port]:
                what = f"port {port} of {host}" if port else host
                raise BadValueError(f"{what} has other upstreams under another name")
        self._vips[host] = {**known, **upstreams}

    def zone(self, ttl: int) -> Zone:
        """The result. Raises BadValueError with every problem."""
        if self.problems:
            raise BadValueError(self.problems)
        return Zone(self._zone.origin, self._names, ttl, Vips(self._vips))


class _Collector:
    """Turns a BadValueError into problems, so that the next part is read as well."""

    def __init__(self, problems: list[str], where: str) -> None:
        self._problems = problems
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, BadValueError):
            return False
        self._problems += [f"{self._where}: {problem}" for problem in error.problems]
        return True


def _mapping(value: object, keys: tuple[str, ...] | None = None) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise BadValueError(f"{shown(repr(value))} is not a mapping")
    if keys is not None:
        unknown = [shown(str(key)) for key in value if key not in keys]
        if unknown:
            raise BadValueError(f"there is no key {', '.join(unknown)}; the keys are {', '.join(keys)}")
    return value


def _list(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _ttl(value: object) -> int:
    number = whole_number(value)
    if number is None or not 0 <= number <= MAX_TTL:
        raise BadValueError(f"{shown(repr(value))} is not within 0-{MAX_TTL}")
    return number


def _host(value: object) -> str:
    """An IP address in the form of inet_ntop(3), as the kernel's answers are shown."""
    try:
        address = ip_address(str(value))
        return socket.inet_ntop(socket.AF_INET if address.version == 4 else socket.AF_INET6, address.packed)
    except ValueError:
        raise BadValueError(f"{shown(repr(value))} is not an IP address") from None


def _upstreams(value: object) -> Upstreams:
    """The addresses for all ports, or a mapping of ports to theirs."""
    if not isinstance(value, Mapping):
        return {ANY_PORT: tuple(_destinations(value))}
    return {_port(key): tuple(_destinations(each)) for key, each in value.items()}


def _port(value: object) -> int:
    number = whole_number(value)
    if number is None or not 1 <= number <= MAX_PORT:
        raise BadValueError(f"{shown(repr(value))} is not a port (1-{MAX_PORT})")
    return number


def _destinations(value: object) -> Iterator[Destination]:
    """Upstream addresses: ADDRESS, or ADDRESS:PORT with an IPv6 address in brackets."""
    for each in _list(value):
        text = str(each)
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed or (colon and ":" not in host):
            yield _destination(host.strip("[]"), _port(port))
        else:
            yield _destination(text.removeprefix("[").removesuffix("]"), ANY_PORT)


def _destination(text: str, port: int) -> Destination:
    host = unmapped(_host(text))
    if ip_address(host).is_unspecified:
        raise BadValueError(f"{shown(repr(text))} is every address of the host; name one")
    return Destination(host, port, socket.AF_INET6 if ":" in host else socket.AF_INET)

"""The connection that `tpctl explain` is asked about: from what was typed, the rest as this host would fill it in."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

from tpctl.config.traffic import is_interface_name, read_mark_number
from tpctl.config.values import quoted
from tpctl.spec.policy import MAX_PORT, MAX_UID, Address, Policy
from tpctl.system.errors import InputError

if TYPE_CHECKING:
    from tpctl.spec.connection import Connection, Direction

FALLBACK_INTERFACE = "eth0"
NAME_SECONDS = 10.0
"""How long the name of a host may take to be looked up."""
_HOST_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_]([A-Za-z0-9._-]{0,252}[A-Za-z0-9_.])?")


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked for, as it was typed."""

    to: str
    source: str | None = None
    user: str | None = None
    process_cgroup: str | None = None
    bound_to: str | None = None
    mark: str | None = None
    interface: str | None = None
    protocol: str = "tcp"
    state: str = "new"
    default_port: int | None = None
    forwarded: bool | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One connection, and whether it can come about at all."""

    connection: Connection
    has_route: bool = True
    """Whether this host has a route there; without one connect(2) fails, and no rule is asked."""


def connections_of(question: Question, direction: Direction, policy: Policy) -> tuple[Asked, ...]:
    """The connections a question is about: one, or one for each address of a host's name. Raises InputError."""
    host, port = _parts(question.to)
    needs_port = question.protocol in ("tcp", "udp") and question.default_port is None
    if not _HOST_NAME.fullmatch(host) or (needs_port and not port):
        return (connection_of(question, direction, policy),)
    found = _looked_up(host)
    if question.source and (wanted := {one.version for one in found} & _versions(question.source)):
        found = [one for one in found if one.version in wanted]
    number = f":{port}" if port else ""
    texts = [f"[{one}]{number}" if one.version == 6 else f"{one}{number}" for one in found]
    return tuple(connection_of(dataclasses.replace(question, to=text), direction, policy) for text in texts)


def is_address(text: str) -> bool:
    """Whether an endpoint names an address, and not a host."""
    return _endpoint("--to", text, []) is not None


def _versions(text: str) -> set[int]:
    endpoint = _endpoint("--from", text, [])
    return {endpoint[0].version} if endpoint else set()


def _looked_up(name: str) -> list[Address]:
    """The addresses that programs on this host get for a name. Raises InputError."""
    import socket

    from tpctl.system.child import ChildFailedError, in_child
    from tpctl.system.errors import ApplyError

    def work() -> str:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError as error:
            return f"-{error.strerror}"
        return "\n".join(dict.fromkeys(str(one[4][0]) for one in found))

    try:  # in a child: the C library runs whatever nsswitch.conf(5) names, and cannot be interrupted
        said = in_child(work, seconds=NAME_SECONDS, what=f"--to: {name} was not resolved", why="nothing answered")
    except (ApplyError, ChildFailedError) as error:
        raise InputError(str(error)) from None
    if said.startswith("-"):
        raise InputError(f"--to: this host finds no address for {quoted(name)}: {said[1:]}")
    return [ip_address(line) for line in said.split("\n")]


def connection_of(question: Question, direction: Direction, policy: Policy) -> Asked:
    """The connection to an address; what it leaves open is filled in as this host would. Raises InputError."""
    from tpctl.host import routes
    from tpctl.spec.connection import Connection, Direction, State

    problems: list[str] = []
    mark = _mark(question.mark, problems)
    to = _endpoint("--to", question.to, problems)
    source = _endpoint("--from", question.source, problems) if question.source else None
    outgoing = direction is Direction.OUTBOUND
    uid = _uid(question.user, problems) if outgoing else None
    cgroup = _cgroup(question.process_cgroup, policy, problems) if outgoing else None
    port = to[1] or question.default_port if to else None
    if to and port is None and question.protocol in ("tcp", "udp"):
        problems.append(f"--to: {quoted(question.to)} has no port; write {joined(to[0], 443)}")
    if to and source and to[0].version != source[0].version:
        problems.append(f"--from and --to: {source[0]} is IPv{source[0].version} and {to[0]} is IPv{to[0].version}")
    for flag, name in (("--interface", question.interface), ("--bound-to", question.bound_to)):
        if name is not None and not is_interface_name(name):
            problems.append(f"{flag}: {quoted(name)} is not the name of an interface")
    if problems or to is None:
        raise InputError(problems)
    peer = to[0] if outgoing or source is None else source[0]
    interface, own = _path(peer, policy.loopback, uid, mark)
    local = routes.matches_local(to[0])
    chosen = question.interface or question.bound_to
    lost = outgoing and not chosen and not routes.is_local(peer) and routes.is_unreachable(peer, uid=uid, mark=mark)
    connection = Connection(
        direction=direction,
        protocol=question.protocol,
        source=source[0] if source else own,
        source_port=source[1] if source else None,
        destination=to[0],
        destination_port=port,
        interface=question.interface or (interface if interface == policy.loopback else question.bound_to) or interface,
        uid=uid,
        cgroup=cgroup,
        mark=mark,
        device=question.bound_to,
        local_destination=local if question.forwarded is None else not question.forwarded,
        local_source=source is None or not outgoing or routes.matches_local(source[0]),
        state=State(question.state),
    )
    return Asked(connection, not lost)


def _path(peer: Address, loopback: str, uid: int | None, mark: int) -> tuple[str, Address]:
    """The interface between this host and a peer, and this host's address on it."""
    from tpctl.host import interfaces, routes

    route = routes.to_address(peer, uid=uid, mark=mark)
    source = (route and route.source) or type(peer)(0)
    if routes.is_local(peer) or (route and route.is_local):
        return loopback, source
    if route and (name := routes.interface_name(route.interface)):
        return name, source
    others = (name for name in interfaces.names() if not interfaces.is_loopback(name))
    return next(others, FALLBACK_INTERFACE), source


def _endpoint(flag: str, text: str, problems: list[str]) -> tuple[Address, int | None] | None:
    """`10.0.0.1:443`, `[fd00::1]:443`, or an address alone."""
    host, port = _parts(text)
    try:
        address = ip_address(host)
    except ValueError:
        also = ", [fd00::1]:443 or example.org:443" if flag == "--to" else " or [fd00::1]:443"
        problems.append(f"{flag}: {quoted(text)} is no ADDRESS:PORT; write 10.1.2.3:443{also}")
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped:  # connections there are of IPv4
        problems.append(f"{flag}: {quoted(text)} is an IPv4 address written as IPv6; write {address.ipv4_mapped}")
        return None
    if not port:
        return address, None
    if not port.isdecimal() or not 1 <= int(port) <= MAX_PORT:
        problems.append(f"{flag}: {quoted(port)} is not a port (1-{MAX_PORT})")
        return None
    return address, int(port)


def _parts(text: str) -> tuple[str, str]:
    """Host and port of an endpoint; the latter may be empty, and the former, where the brackets are wrong."""
    host, port = text.strip(), ""
    if host.startswith("["):
        host, _, port = host[1:].partition("]")
        return (host, port[1:]) if port[:1] in ("", ":") else ("", "")
    if host.count(":") == 1:
        host, _, port = host.partition(":")
    return host, port


def _uid(user: str | None, problems: list[str]) -> int | None:
    if user is None:
        return os.geteuid()
    if user.isdecimal():
        if int(user) <= MAX_UID:
            return int(user)
        problems.append(f"--uid: {quoted(user)} is not within the uids 0-{MAX_UID}")
        return None
    from tpctl.host.users import uid_of

    uid = uid_of(user)
    if uid is None:
        problems.append(f"--uid: there is no user {quoted(user)} on this host; give a uid")
    return uid


def _mark(text: str | None, problems: list[str]) -> int:
    mark = read_mark_number(text) if text is not None else 0
    if mark is None:
        problems.append(f"--mark: {quoted(text)} is not a mark of at most 32 bits, such as 0x80000 or 51820")
    return mark or 0


def _cgroup(path: str | None, policy: Policy, problems: list[str]) -> str | None:
    """The path of the process's control group; None where nobody asks for it."""
    if path is None:
        from tpctl.host import cgroups

        return cgroups.of_process("self") if policy.cgroup else None
    from tpctl.config.values import BadValueError, read_cgroup

    try:
        return read_cgroup(path, problems.append)
    except BadValueError as error:
        problems.append(f"--process-cgroup: {error}")
        return None


def joined(address: Address, port: int | None) -> str:
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"

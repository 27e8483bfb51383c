"""A host that is made up, and what a configuration comes to on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import pytest

from tpctl.config.load import load
from tpctl.config.resolve import Resolved, resolve
from tpctl.host.facts import Host
from tpctl.host.resolvers import Resolv, parse
from tpctl.host.sockets import Listener
from tpctl.spec.exclusions import Mark
from tpctl.spec.policy import Address, Cgroup, Protocol, contains
from tpctl.system.errors import HostError, InputError


@dataclass
class FakeHost:
    """A host made of plain values."""

    users: dict[str, int] = field(default_factory=lambda: {"5678": 5678, "kuma-dp": 5678, "root": 0, "0": 0})
    loopback_name: str | None = "lo"
    ipv6: bool = True
    ipv6_turned_on: bool = True
    local: tuple[str, ...] = ("127.0.0.0/8", "::1/128", "192.0.2.2/32")
    resolv: str | None = "nameserver 10.0.0.53\nnameserver fd00::53\n"
    sockets: tuple[Listener, ...] = ()
    processes: dict[int, int] = field(default_factory=dict)
    ssh_session: int | None = None
    marks: tuple[Mark, ...] = ()
    cgroups: dict[str, int] = field(default_factory=lambda: {"system.slice/app.service": 7})
    process_groups: dict[int, str] = field(default_factory=dict)

    def uid_of(self, user: str) -> int | None:
        return self.users.get(user)

    def loopback(self) -> str | None:
        return self.loopback_name

    def has_ipv6(self) -> bool:
        return self.ipv6

    def speaks_ipv6(self) -> bool:
        return self.ipv6_turned_on

    def is_local(self, address: Address) -> bool:
        return contains([ip_network(network) for network in self.local], address)

    def name_servers(self, path: str) -> Resolv:
        if self.resolv is None:
            raise HostError(f"{path} cannot be read: Permission denied")
        return parse(self.resolv)

    def listeners(self, protocol: Protocol) -> tuple[Listener, ...]:
        return tuple(one for one in self.sockets if one.protocol is protocol)

    def process_uid(self, listener: Listener) -> int | None:
        return self.processes.get(listener.inode)

    def cgroup(self, path: str) -> Cgroup:
        if path not in self.cgroups:
            raise HostError(f"there is no control group {path}")
        return Cgroup(path, self.cgroups[path])

    def process_cgroup(self, listener: Listener) -> str | None:
        return self.process_groups.get(listener.inode)

    def marks_kept_out_of_tunnels(self) -> tuple[Mark, ...]:
        return self.marks

    def ssh_session_port(self) -> int | None:
        return self.ssh_session


def resolved(host: Host | None = None, /, **flags: str) -> Resolved:
    """What flags, by option name, come to on a host."""
    return resolve(load(flags={name: [value] for name, value in flags.items()}), host or FakeHost())


def problems(host: Host | None = None, /, **flags: str) -> tuple[str, ...]:
    """What is wrong with them."""
    with pytest.raises(InputError) as caught:
        resolved(host, **flags)
    return caught.value.problems


def dns_socket(address: str, uid: int, inode: int = 1) -> Listener:
    """A UDP socket bound to port 53."""
    return Listener(Protocol.UDP, ip_address(address), 53, uid, inode)

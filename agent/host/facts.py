"""What `agent.resolve` has to know of the host, as an interface, and the real host behind it."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from agent.host import cgroups, interfaces, resolvers, sockets, ssh, users
from agent.host.sockets import Listener
from agent.policy import Address, Cgroup, Network, contains
from agent.policy import Protocol as Transport


class Host(Protocol):
    """Read-only facts of one host; nothing here changes anything."""

    def uid_of(self, user: str) -> int | None:
        """The uid of an existing user, given by uid or name."""
        ...

    def loopback(self) -> str | None:
        """The name of the loopback interface."""
        ...

    def has_ipv6(self) -> bool:
        """Whether an interface other than loopback has an IPv6 address."""
        ...

    def is_local(self, address: Address) -> bool:
        """Whether packets to the address are delivered to this host."""
        ...

    def resolv_conf(self, path: str) -> str:
        """The text of a resolv.conf. Raises HostError when it cannot be read."""
        ...

    def listeners(self, protocol: Transport) -> tuple[Listener, ...]:
        """The listening sockets of this network namespace."""
        ...

    def process_uid(self, listener: Listener) -> int | None:
        """The uid the process behind a socket runs as now, where that can be found out."""
        ...

    def cgroup(self, path: str) -> Cgroup:
        """The control group of a path. Raises HostError when there is none."""
        ...

    def process_cgroup(self, listener: Listener) -> str | None:
        """The path of the control group of the process behind a socket, where that can be found out."""
        ...

    def ssh_session_port(self) -> int | None:
        """The port of this host that the caller's ssh session came in by."""
        ...


class LiveHost:
    """The host tpctl runs on, seen from its network namespace."""

    @cached_property
    def _local(self) -> tuple[Network, ...]:
        return interfaces.local_networks()

    def uid_of(self, user: str) -> int | None:
        """See `Host`."""
        return users.uid_of(user)

    def loopback(self) -> str | None:
        """See `Host`."""
        return interfaces.loopback_name()

    def has_ipv6(self) -> bool:
        """See `Host`."""
        return interfaces.has_ipv6(self.loopback())

    def is_local(self, address: Address) -> bool:
        """See `Host`."""
        return contains(self._local, address)

    def resolv_conf(self, path: str) -> str:
        """See `Host`."""
        return resolvers.read_resolv_conf(path)

    def listeners(self, protocol: Transport) -> tuple[Listener, ...]:
        """See `Host`."""
        return sockets.listeners(protocol)

    def process_uid(self, listener: Listener) -> int | None:
        """See `Host`."""
        return sockets.process_uid(listener.inode)

    def cgroup(self, path: str) -> Cgroup:
        """See `Host`."""
        return cgroups.find(path)

    def process_cgroup(self, listener: Listener) -> str | None:
        """See `Host`."""
        process = sockets.process_of(listener.inode)
        return None if process is None else cgroups.of_process(process)

    def ssh_session_port(self) -> int | None:
        """See `Host`."""
        return ssh.session_port()

"""What `tpctl.config.resolve` has to know of the host, as an interface, and the real host behind it."""

from __future__ import annotations

from typing import Protocol

from tpctl.host import cgroups, interfaces, resolvers, routes, rules, sockets, ssh, users
from tpctl.host.resolvers import Resolv
from tpctl.host.sockets import Listener
from tpctl.spec.exclusions import Mark
from tpctl.spec.policy import Address, Cgroup
from tpctl.spec.policy import Protocol as Transport


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

    def speaks_ipv6(self) -> bool:
        """Whether IPv6 could be redirected: the kernel has it, and it is turned on for loopback."""
        ...

    def is_local(self, address: Address) -> bool:
        """Whether packets to the address are delivered to this host."""
        ...

    def name_servers(self, path: str) -> Resolv:
        """What a resolv.conf comes to. Raises HostError when it cannot be read."""
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

    def marks_kept_out_of_tunnels(self) -> tuple[Mark, ...]:
        """The marks of sockets that routing rules keep out of a tunnel; none when they cannot be read."""
        ...

    def ssh_session_port(self) -> int | None:
        """The port of this host that the caller's ssh session came in by."""
        ...


class LiveHost:
    """The host tpctl runs on, seen from its network namespace."""

    def uid_of(self, user: str) -> int | None:
        """See `Host`."""
        return users.uid_of(user)

    def loopback(self) -> str | None:
        """See `Host`."""
        return interfaces.loopback_name()

    def has_ipv6(self) -> bool:
        """See `Host`."""
        return interfaces.has_ipv6(self.loopback())

    def speaks_ipv6(self) -> bool:
        """See `Host`."""
        return interfaces.speaks_ipv6(self.loopback() or "lo")

    def is_local(self, address: Address) -> bool:
        """See `Host`."""
        return routes.is_local(address)

    def name_servers(self, path: str) -> Resolv:
        """See `Host`."""
        return resolvers.load(path)

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

    def marks_kept_out_of_tunnels(self) -> tuple[Mark, ...]:
        """See `Host`."""
        try:
            return rules.kept_out_of_tunnels()
        except OSError:
            return ()

    def ssh_session_port(self) -> int | None:
        """See `Host`."""
        return ssh.session_port()

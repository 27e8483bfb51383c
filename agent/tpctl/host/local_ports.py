"""The ports that the kernel gives to sockets that ask for none: ip(7), Documentation/networking/ip-sysctl.rst.

What listens on such a port cannot be started while a connection that goes out has it. The range and its exceptions hold
for both families, and for the network namespace of the thread that asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tpctl.spec.policy import PortRange, Ports, includes
from tpctl.system import text

SYSCTLS = Path("/proc/sys/net/ipv4")
RANGE, RESERVED = "ip_local_port_range", "ip_local_reserved_ports"


class LocalPorts(NamedTuple):
    """What the kernel chooses from."""

    given: PortRange | None
    """None where that cannot be told."""
    reserved: Ports = ()
    """Those that it leaves out."""

    def at_risk(self, ports: Iterable[int]) -> tuple[int, ...]:
        """Those of `ports` that a connection may get as its source port."""
        if self.given is None:
            return ()
        given = self.given
        return tuple(sorted({port for port in ports if port in given and not includes(self.reserved, port)}))


def local_ports() -> LocalPorts:
    """Those of this network namespace."""
    try:
        first, last = text.read(SYSCTLS / RANGE).split()
        return LocalPorts(PortRange(max(1, int(first)), int(last)), parse_ports(text.read(SYSCTLS / RESERVED)))
    except (OSError, ValueError):
        return LocalPorts(None)


def parse_ports(listing: str) -> Ports:
    """Ports and ranges as the kernel writes them: 15001,15006,20000-20010. Raises ValueError for anything else.

    >>> [str(one) for one in parse_ports("15001,20000-20010\\n")]
    ['15001', '20000-20010']
    """
    words = [word.strip() for word in listing.replace("\n", ",").split(",")]
    return tuple(_range(word) for word in words if word)


def _range(word: str) -> PortRange:
    first, dash, last = word.partition("-")
    return PortRange(int(first), int(last) if dash else int(first))


def merged(*lists: Ports) -> Ports:
    """The ports of several lists as one: in order, and without overlaps."""
    found: list[PortRange] = []
    for one in sorted(one for ports in lists for one in ports):
        if found and one.first <= found[-1].last + 1:
            found[-1] = PortRange(found[-1].first, max(found[-1].last, one.last))
        else:
            found.append(one)
    return tuple(found)


def without(ports: Ports, taken: Iterable[int]) -> Ports:
    """Ports less some of them."""
    left = list(ports)
    for port in taken:
        cut = [one for one in left if port in one]
        for one in cut:
            left.remove(one)
            left += [PortRange(one.first, port - 1)] if port > one.first else []
            left += [PortRange(port + 1, one.last)] if port < one.last else []
    return tuple(sorted(left))


def listing(ports: Ports) -> str:
    """As the kernel takes it."""
    return ",".join(map(str, ports))

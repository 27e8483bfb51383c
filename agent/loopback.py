"""The address ::6 on the loopback interface, from which the data plane dials applications over IPv6.

IPv4 needs nothing, because all of 127.0.0.0/8 is local. The address is added with the flag `noprefixroute`, which
nobody needs for a /128 and which therefore marks it as ours: uninstall takes it away without any record, and leaves one
that somebody else added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.errors import ApplyError
from agent.host import sockets
from agent.host.proc import read_net
from agent.policy import PASSTHROUGH6

IFA_F_NOPREFIXROUTE = 0x200
"""include/uapi/linux/if_addr.h"""
ADDRESSES = Path("/proc/self/net/if_inet6")


def present(interface: str) -> bool:
    """Whether ::6 is on the interface."""
    wanted = PASSTHROUGH6.packed.hex()
    try:
        lines = ADDRESSES.read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[0] == wanted and line.split()[-1] == interface for line in lines)


def connections() -> int:
    """How many TCP connections run from ::6, and would be cut if it went."""
    found = sockets.parse_connections(read_net("tcp6"))
    return sum(1 for ends in found if ends.local == PASSTHROUGH6.packed)


def add(interface: str) -> bool:
    """Add ::6 to the interface; False when it is there already. Raises ApplyError when the kernel refuses."""
    if present(interface):
        return False
    _netlink("add", interface, flags=IFA_F_NOPREFIXROUTE)
    return True


def remove(interface: str, *, dry_run: bool = False) -> bool:
    """Take ::6 off the interface if tpctl added it; whether it did (or would)."""
    if not present(interface) or not _is_ours(interface):
        return False
    if not dry_run:
        _netlink("del", interface)
    return True


def _is_ours(interface: str) -> bool:
    from pyroute2.iproute import IPRoute

    with IPRoute() as netlink:
        index = netlink.link_lookup(ifname=interface)[0]
        return any(
            message.get("IFA_ADDRESS") == str(PASSTHROUGH6) and message.get("IFA_FLAGS", 0) & IFA_F_NOPREFIXROUTE
            for message in netlink.get_addr(index=index, family=10)
        )


def _netlink(verb: str, interface: str, **arguments: Any) -> None:
    from pyroute2.iproute import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as netlink:
            index = netlink.link_lookup(ifname=interface)[0]
            netlink.addr(verb, index=index, address=str(PASSTHROUGH6), prefixlen=128, **arguments)
    except (NetlinkError, IndexError, OSError) as error:
        raise ApplyError(f"cannot {verb} {PASSTHROUGH6} on {interface}: {error}") from error

"""The address ::6 on the loopback interface, from which the data plane dials applications over IPv6.

IPv4 needs nothing, because all of 127.0.0.0/8 is local. The address is added with the flag `noprefixroute`, which
nobody needs for a /128 and which therefore marks it as ours: uninstall takes it away without any record, and leaves one
that somebody else added. One that came with kumactl's rules, which leave it behind, is marked when those rules go.
"""

from __future__ import annotations

import struct
import sys

from tpctl.host import interfaces, sockets
from tpctl.host.interfaces import ipv6_addresses
from tpctl.spec.policy import PASSTHROUGH6
from tpctl.system import netlink
from tpctl.system.errors import ApplyError

IFA_F_NOPREFIXROUTE = 0x200
"""include/uapi/linux/if_addr.h"""
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_AF_INET6 = 10
_MESSAGE = struct.Struct("=BBBBI")
"""struct ifaddrmsg (rtnetlink(7)): family, length of the prefix, flags, scope, index."""
_REPLACE = 0x100
_VERBS = {
    "add": (_RTM_NEWADDR, netlink.CREATE | netlink.EXCLUSIVE),
    "replace": (_RTM_NEWADDR, netlink.CREATE | _REPLACE),
    "del": (_RTM_DELADDR, 0),
}
OURS, OTHERS = "ours", "others"


def present(interface: str) -> bool:
    """Whether ::6 is on the interface."""
    return any(one.address == PASSTHROUGH6 and one.interface == interface for one in ipv6_addresses())


def connections() -> int:
    """How many TCP connections run from ::6, and would be cut if it went."""
    return sum(1 for ends in sockets.connections() if ends.local == PASSTHROUGH6.packed)


def add(interface: str) -> bool:
    """Add ::6 to the interface; False when it is there already. Raises ApplyError when the kernel refuses."""
    if present(interface):
        return False
    _change("add", interface, IFA_F_NOPREFIXROUTE)
    return True


def owner(interface: str) -> str | None:
    """Whether ::6 on the interface is marked as `OURS` or is of `OTHERS`; None when it is not there."""
    if not present(interface):
        return None
    return OURS if _is_ours(interface) else OTHERS


def mark(interface: str) -> None:
    """Make ::6 on the interface ours. Raises ApplyError when the kernel refuses."""
    _change("replace", interface, IFA_F_NOPREFIXROUTE)


def bring_back(interface: str, was: str | None) -> None:
    """Make ::6 on the interface what `owner` said. Raises ApplyError when the kernel refuses.

    It is not taken away: connections may run from it.
    """
    if was is not None and owner(interface) != was:
        _change("replace", interface, IFA_F_NOPREFIXROUTE if was == OURS else 0)


def remove(interface: str, *, dry_run: bool = False) -> bool:
    """Take ::6 off the interface if it is ours; whether it did (or would)."""
    if owner(interface) != OURS:
        return False
    if not dry_run:
        _change("del", interface)
    return True


def _is_ours(interface: str) -> bool:
    try:
        index = interfaces.index(interface)
        with netlink.Netlink(netlink.ROUTE) as kernel:
            held = kernel.ask(_RTM_GETADDR, _MESSAGE.pack(_AF_INET6, 0, 0, 0, 0), netlink.DUMP)
            return any(_marked(message, index) for message in held)
    except OSError as error:
        raise ApplyError(f"cannot read the addresses of {interface}: {error.strerror}") from error


def _marked(held: bytes, index: int) -> bool:
    found = netlink.parse(held[_MESSAGE.size :])
    flags = int.from_bytes(found.get(_IFA_FLAGS, b""), sys.byteorder)
    is_here = _MESSAGE.unpack_from(held)[4] == index and found.get(_IFA_ADDRESS) == PASSTHROUGH6.packed
    return is_here and bool(flags & IFA_F_NOPREFIXROUTE)


def _change(verb: str, interface: str, flags: int = 0) -> None:
    kind, how = _VERBS[verb]
    try:
        message = _MESSAGE.pack(_AF_INET6, PASSTHROUGH6.max_prefixlen, 0, 0, interfaces.index(interface))
        address: dict[int, netlink.Value] = {
            _IFA_ADDRESS: PASSTHROUGH6.packed,
            _IFA_LOCAL: PASSTHROUGH6.packed,
            _IFA_FLAGS: flags,
        }
        with netlink.Netlink(netlink.ROUTE) as kernel:
            kernel.change(kind, message + netlink.attributes(address), how)
    except OSError as error:
        raise ApplyError(f"cannot {verb} {PASSTHROUGH6} on {interface}: {error.strerror}") from error

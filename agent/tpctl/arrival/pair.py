"""Veth pairs (veth(4)) of our own: one end in this network namespace, the other in a scratch one, for a second.

Everything hangs on the scratch namespace, which only this process holds open: when it goes, however it goes, the kernel
removes the end in it, with that the end here, and with that every address, route and neighbour of the device.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from typing import Self

from tpctl.host import interfaces
from tpctl.rehearsal.namespaces import READY_AND_QUIET, Namespace, write_sysctls
from tpctl.rehearsal.sockets import AF
from tpctl.spec.policy import Address, Family
from tpctl.system import netlink
from tpctl.system.errors import HostError
from tpctl.system.netlink import Netlink

PREFIX = "tpctl-"
"""What the names of the devices begin with, for network managers that are told to leave them alone."""
_SETTLE_SECONDS = 5.0
"""It takes milliseconds, unless others on this host change links and namespaces all the time."""

_RTM_NEWLINK, _RTM_DELLINK, RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_NEWNEIGH, _RTM_DELNEIGH = 20, 28, 29
LINK = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, which flags change."""
_IFF_UP, IFF_NOARP = 1, 0x80
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_OPERSTATE, IFLA_LINKINFO = 1, 3, 4, 10, 16, 18
_IFLA_AF_SPEC, _IFLA_NET_NS_FD = 26, 28
INFO_KIND, INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_INET6_ADDR_GEN_MODE, _GENERATE_NONE = 8, b"\1"
"""No link-local address, for which the kernel would send packets."""
OPERSTATE_UP = b"\6"
_ADDRESS = struct.Struct("=BBBBI")
_IFA_ADDRESS, _IFA_LOCAL, _IFA_F_NODAD = 1, 2, 0x02
NEIGHBOUR = struct.Struct("=BxxxiHBB")
NDA_DST, _NDA_LLADDR = 1, 2
PERMANENT, REACHABLE = 0x80, 0x02
"""States of a neighbour; the second is learnt anew after a while."""
RTM_NEWROUTE = 24
ROUTE = struct.Struct("=BBBBBBBBI")
RTA_OIF, _RTA_GATEWAY = 4, 5
TABLE_MAIN, RTPROT_STATIC, RTN_UNICAST = 254, 4, 1
LOOPBACK_INDEX = 1
"""linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/neighbour.h, linux/veth.h, linux/if.h."""
NEW = netlink.CREATE | netlink.EXCLUSIVE


class Pair:
    """The pair, up, without addresses. A context manager: at the end the device is gone.

    Raises HostError when the kernel refuses, and says what.
    """

    def __init__(self, near: Mapping[int, netlink.Value], far: Mapping[int, netlink.Value], far_flags: int = 0) -> None:
        """`near` and `far` are more attributes of the two ends (IFLA_...)."""
        self.name = f"{PREFIX}{secrets.token_hex(4)}"
        self.space = Namespace()
        try:
            self.near = Netlink(netlink.ROUTE)
            with self.space.inside():
                write_sysctls(READY_AND_QUIET)
                self.far = Netlink(netlink.ROUTE)
            self._lay(near, far)
            for kernel, index, flags in ((self.far, self.far_index, far_flags), (self.near, self.index, 0)):
                _keep_quiet(kernel, index)
                _set_flags(kernel, index, _IFF_UP | flags)
        except OSError as error:
            self.space.close()
            raise HostError(f"this kernel cannot make a veth pair: {error.strerror}") from error
        except BaseException:
            self.space.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the device, which waits until it is gone, and let the scratch namespace go."""
        # By a socket of its own: a child may have used the other ones, and left answers unread.
        with contextlib.suppress(OSError), Netlink(netlink.ROUTE) as kernel:
            kernel.change(_RTM_DELLINK, LINK.pack(0, 0, self.index, 0, 0))
        for used in (self.near, self.far):
            used.__exit__()
        self.space.close()

    def _lay(self, near: Mapping[int, netlink.Value], far: Mapping[int, netlink.Value]) -> None:
        name = self.name.encode() + b"\0"
        peer = LINK.pack(0, 0, 0, 0, 0) + netlink.attributes({IFLA_IFNAME: name, _IFLA_NET_NS_FD: self.space.fd, **far})
        made: dict[int, netlink.Value] = {
            IFLA_IFNAME: name,
            IFLA_LINKINFO: {INFO_KIND: b"veth", INFO_DATA: {_VETH_INFO_PEER: peer}},
            **near,
        }
        self.near.change(_RTM_NEWLINK, LINK.pack(0, 0, 0, 0, 0) + netlink.attributes(made), NEW)
        self.index = interfaces.index(self.name)
        with self.space.inside():
            self.far_index = interfaces.index(self.name)
        _set_flags(self.far, LOOPBACK_INDEX, _IFF_UP)

    def await_carrier(self) -> None:
        """Until linkwatch has set the operational state, packets are dropped (net/core/link_watch.c)."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        pending = [(self.near, self.index), (self.far, self.far_index)]
        while pending and time.monotonic() < deadline:
            pending = [one for one in pending if not _is_up(*one)]
            if pending:
                time.sleep(0.001)


def _set_flags(kernel: Netlink, index: int, flags: int) -> None:
    kernel.change(_RTM_NEWLINK, LINK.pack(0, 0, index, flags, flags))


def _keep_quiet(kernel: Netlink, index: int) -> None:
    body = netlink.attributes({_IFLA_AF_SPEC: {socket.AF_INET6: {_INET6_ADDR_GEN_MODE: _GENERATE_NONE}}})
    with contextlib.suppress(OSError):  # a kernel without IPv6
        kernel.change(_RTM_NEWLINK, LINK.pack(0, 0, index, 0, 0) + body)


def _is_up(kernel: Netlink, index: int) -> bool:
    for message in kernel.ask(RTM_GETLINK, LINK.pack(0, 0, index, 0, 0)):
        return netlink.parse(message[LINK.size :]).get(IFLA_OPERSTATE) == OPERSTATE_UP
    return False


def add_address(kernel: Netlink, index: int, address: Address, prefix: int) -> None:
    """Give a device an address, at once (without duplicate address detection). Raises OSError."""
    family = Family.of(address)
    flags = _IFA_F_NODAD if family is Family.IPV6 else 0
    head = _ADDRESS.pack(AF[family], prefix, flags, 0, index)
    body = netlink.attributes({_IFA_LOCAL: address.packed, _IFA_ADDRESS: address.packed})
    kernel.change(_RTM_NEWADDR, head + body, NEW)


def add_default_route(kernel: Netlink, index: int, router: Address) -> None:
    """Let a device lead everywhere. Raises OSError."""
    head = ROUTE.pack(AF[Family.of(router)], 0, 0, 0, TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST, 0)
    kernel.change(RTM_NEWROUTE, head + netlink.attributes({_RTA_GATEWAY: router.packed, RTA_OIF: index}), NEW)


def add_neighbour(kernel: Netlink, index: int, address: Address, mac: bytes, state: int = PERMANENT) -> None:
    """Tell a device who has an address, so that it need not ask. Raises OSError, FileExistsError if it knows."""
    head = NEIGHBOUR.pack(AF[Family.of(address)], index, state, 0, 0)
    kernel.change(_RTM_NEWNEIGH, head + netlink.attributes({NDA_DST: address.packed, _NDA_LLADDR: mac}), NEW)


def forget_neighbour(kernel: Netlink, index: int, address: Address) -> None:
    """Take that away. Raises OSError."""
    head = NEIGHBOUR.pack(AF[Family.of(address)], index, 0, 0, 0)
    kernel.change(_RTM_DELNEIGH, head + netlink.attributes({NDA_DST: address.packed}))


def local_mac() -> bytes:
    """A random address of a device. One that somebody has set is one that udev leaves alone (MACAddressPolicy=)."""
    return bytes([2, *secrets.token_bytes(5)])

"""The pair by which a host calls, and is called by, somebody else for the probes' sake.

The addresses are of 198.18.0.0/15, which is for tests of network devices and routed nowhere (RFC 2544, RFC 6890), and
of a random unique local prefix (RFC 4193), where nothing on this host uses them.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from tpctl.arrival.pair import (
    IFLA_ADDRESS,
    LOOPBACK_INDEX,
    NEW,
    ROUTE,
    RTA_OIF,
    RTM_NEWROUTE,
    RTN_UNICAST,
    RTPROT_STATIC,
    TABLE_MAIN,
    Pair,
    add_address,
    add_default_route,
    add_neighbour,
    local_mac,
)
from tpctl.host import routes
from tpctl.rehearsal.sockets import AF
from tpctl.spec.policy import Address, Family
from tpctl.system import netlink
from tpctl.system.errors import HostError

_TRIES = 16
_TEST_NETWORK = int(IPv4Address("198.18.0.0"))
_TEST_NETWORK_QUARTERS = 1 << 15
"""So many networks of four addresses are in 198.18.0.0/15."""
_PREFIX_LENGTH = {Family.IPV4: 30, Family.IPV6: 126}
_MOST_OF_A_DEFAULT = 11
"""A route of at most so many bits is one like a default route (VPNs have halves of it), and does not mean a use."""

_RTA_DST, _RTA_SRC, _RTA_PREFSRC = 1, 2, 7
_TABLE_LOCAL, _SCOPE_LINK, _SCOPE_HOST, _RTN_LOCAL = 255, 253, 254, 2
"""linux/rtnetlink.h."""
TYPE_OF_SERVICE = 0x04
"""Of queries to a name server elsewhere, and of the route that keeps them on the cable: nobody else's packets have it.
RFC 1349, 2: "maximize reliability"."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The two addresses of a family."""

    near: Address
    """This host's."""
    far: Address
    """That of the scratch namespace."""


class Cable(Pair):
    """The pair with addresses. Raises HostError when the kernel refuses, and says what."""

    def __init__(self, wanted: frozenset[Family], avoid: Callable[[Address], bool]) -> None:
        """Addresses that `avoid` says yes to are taken only where there are no others."""
        self._macs = [local_mac(), local_mac()]
        super().__init__({IFLA_ADDRESS: self._macs[0]}, {IFLA_ADDRESS: self._macs[1]})
        self.ends: dict[Family, Ends] = {}
        self.missing: dict[Family, str] = {}
        """Families that the cable does not have, and why."""
        try:
            for family in sorted(wanted):
                self._give_addresses(family, avoid)
            self.await_carrier()
        except OSError as error:
            self.close()
            raise HostError(f"this kernel cannot give a veth pair addresses: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def _give_addresses(self, family: Family, avoid: Callable[[Address], bool]) -> None:
        found = _free_ends(family, avoid)
        if found is None:
            what = "198.18.0.0/15" if family is Family.IPV4 else "fd00::/8"
            self.missing[family] = f"this host has routes to all of {what}"
            return
        prefix = _PREFIX_LENGTH[family]
        try:
            if family is Family.IPV6:
                _allow_ipv6(self.name)
            add_address(self.near, self.index, found.near, prefix)
            add_address(self.far, self.far_index, found.far, prefix)
            add_neighbour(self.near, self.index, found.far, self._macs[1])
            add_neighbour(self.far, self.far_index, found.near, self._macs[0])
            add_default_route(self.far, self.far_index, found.near)  # back to virtual networks
        except OSError as error:
            self.missing[family] = f"the kernel does not give {self.name} an IPv{family} address: {error.strerror}"
            return
        self.ends[family] = found

    def lead(self, server: Address) -> None:
        """Let queries for a name server elsewhere go to the scratch namespace, if they are not redirected.

        Only those of a probe: of IPv4 they have `TYPE_OF_SERVICE`, of IPv6 they come from the cable's own address.
        Raises OSError when the kernel has no such routes (IPv6: CONFIG_IPV6_SUBTREES).
        """
        family = Family.of(server)
        bits, near = server.max_prefixlen, self.ends[family].near
        add_neighbour(self.near, self.index, server, self._macs[1])
        is_v4 = family is Family.IPV4
        head = ROUTE.pack(
            AF[family], bits, 0 if is_v4 else bits, TYPE_OF_SERVICE if is_v4 else 0,
            TABLE_MAIN, RTPROT_STATIC, _SCOPE_LINK if is_v4 else 0, RTN_UNICAST, 0,
        )  # fmt: skip
        source = {_RTA_PREFSRC: near.packed} if is_v4 else {_RTA_SRC: near.packed}
        self.near.change(
            RTM_NEWROUTE, head + netlink.attributes({_RTA_DST: server.packed, RTA_OIF: self.index, **source}), NEW
        )
        here = ROUTE.pack(AF[family], bits, 0, 0, _TABLE_LOCAL, RTPROT_STATIC, _SCOPE_HOST, _RTN_LOCAL, 0)
        self.far.change(
            RTM_NEWROUTE, here + netlink.attributes({_RTA_DST: server.packed, RTA_OIF: LOOPBACK_INDEX}), NEW
        )


def _allow_ipv6(name: str) -> None:
    """A device may come without IPv6 on a host that has it (net.ipv6.conf.default.disable_ipv6)."""
    path = Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
    with contextlib.suppress(OSError):
        if path.read_text(encoding="ascii").strip() != "0":
            path.write_text("0", encoding="ascii")


def _candidates(family: Family) -> Iterator[Ends]:
    for _ in range(_TRIES):
        if family is Family.IPV4:
            first = _TEST_NETWORK + 4 * secrets.randbelow(_TEST_NETWORK_QUARTERS)
            yield Ends(IPv4Address(first + 1), IPv4Address(first + 2))
        else:
            packed = b"\xfd" + secrets.token_bytes(7) + bytes(7)
            yield Ends(IPv6Address(packed + b"\1"), IPv6Address(packed + b"\2"))


def _free_ends(family: Family, avoid: Callable[[Address], bool]) -> Ends | None:
    free = (ends for ends in _candidates(family) if not any(map(_is_used, (ends.near, ends.far))))
    second = None
    for ends in free:
        if not (avoid(ends.near) or avoid(ends.far)):
            return ends
        second = second or ends
    return second


def _is_used(address: Address) -> bool:
    """Whether a route of this host means the address, and not nearly everything."""
    try:
        return routes.matched_length(address.packed) > _MOST_OF_A_DEFAULT
    except OSError as error:
        return error.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP)


def leaves_by(address: Address, index: int, uids: Mapping[str, int]) -> str | None:
    """Which user's packets to the address do not leave by the interface of that index, in words; None if all do."""
    for who, uid in uids.items():
        with contextlib.suppress(OSError):
            route = routes.route_to(address.packed, uid=uid)
            if route is None:
                return f"routing has no route to {address} for {who}"
            if route.interface != index:
                return f"routing sends packets of {who} for {address} to {routes.interface_name(route.interface)}"
    return None

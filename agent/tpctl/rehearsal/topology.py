"""Builds a `Layout` in anonymous namespaces, over netlink."""

from __future__ import annotations

import time
from collections.abc import Iterable
from ipaddress import ip_network
from typing import Any

from tpctl.host.proc import read_net
from tpctl.rehearsal.layout import (
    CONTAINER_LINK,
    HOST,
    HOST_ADDRESS,
    HOST_LINK_LOCAL,
    PEER,
    PEER_ADDRESS,
    PEER_LINK_LOCAL,
    Bridge,
    Layout,
    far_end,
    gateway,
    member,
)
from tpctl.rehearsal.namespaces import READY_AND_QUIET, Namespace, write_sysctls
from tpctl.spec.policy import Family, Network
from tpctl.system import text

_MAIN_TABLE = 254
_LOCAL_TABLE = 255
_SCOPE_HOST = 254
_SCOPE_LINK = 253
_EVERYTHING = {Family.IPV4: "0.0.0.0/0", Family.IPV6: "::/0"}
_LINK_LOCAL = "fe80::/64"

_IFA_F_TENTATIVE = 0x40
"""include/uapi/linux/if_addr.h"""
_SETTLE_SECONDS = 10.0

_SYSCTLS = READY_AND_QUIET | {
    # What arrives for 127.0.0.0/8, and rules leave alone, has to end somewhere for that to be seen.
    "ipv4/conf/all/route_localnet": "1",
    "ipv4/conf/all/accept_local": "1",
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
    # Listeners are created under the users that matter, on any port.
    "ipv4/ip_unprivileged_port_start": "0",
    # A closed UDP port answers every time, not once in a while.
    "ipv4/icmp_ratelimit": "0",
    "ipv6/icmp/ratelimit": "0",
}


class _Node:
    """One namespace and its netlink socket."""

    def __init__(self, namespace: Namespace) -> None:
        from pyroute2.iproute import IPRoute

        self.namespace = namespace
        with namespace.inside():
            write_sysctls(_SYSCTLS)
            self.netlink: Any = IPRoute()
        self.netlink.link("set", index=1, state="up")
        self.cabled: list[str] = []

    def index(self, name: str) -> int:
        return int(self.netlink.link_lookup(ifname=name)[0])

    def address(self, name: str, address: object, prefix: int) -> None:
        self.netlink.addr("add", index=self.index(name), address=str(address), prefixlen=prefix)

    def up(self, name: str) -> None:
        self.netlink.link("set", index=self.index(name), state="up")

    def default_route(self, family: Family, via: object) -> None:
        self.netlink.route("add", dst=_EVERYTHING[family], gateway=str(via), table=_MAIN_TABLE)

    def answer_for(self, network: Network | str) -> None:
        """AnyIP: every address of the network is local. More specific routes must stand in the same table to win."""
        self.netlink.route("add", dst=str(network), type="local", scope=_SCOPE_HOST, table=_LOCAL_TABLE, oif=1)

    def on_link(self, network: Network | str, name: str, metric: int = 0) -> None:
        route = {"oif": self.index(name), "scope": _SCOPE_LINK, "table": _LOCAL_TABLE}
        self.netlink.route("add", dst=str(network), **route, **({"priority": metric} if metric else {}))

    def via(self, network: Network, gateway_address: object) -> None:
        self.netlink.route("add", dst=str(network), gateway=str(gateway_address), table=_LOCAL_TABLE)

    def has_settled(self) -> bool:
        """Whether packets pass its links, and every IPv6 address of it may be used.

        A link with its other end up drops packets until linkwatch, which sets its operational state, has got to it.
        """
        states = [self.netlink.get_links(self.index(name))[0].get_attr("IFLA_OPERSTATE") for name in self.cabled]
        with self.namespace.inside():
            addresses = read_net("if_inet6")
        return all(state == "UP" for state in states) and not _tentative(addresses)


def build(layout: Layout, host: Namespace | None = None) -> dict[str, Namespace]:
    """Make the namespaces of a layout and everything in them, by node name; `host` is one that is there already.

    Raises HostError.
    """
    spaces: dict[str, Namespace] = {}
    nodes: dict[str, _Node] = {}
    try:
        for name in (HOST, PEER, *(bridge.name for bridge in layout.bridges)):
            spaces[name] = host if host and name == HOST else Namespace()
            nodes[name] = _Node(spaces[name])
        _connect_peer(layout, nodes)
        for bridge in layout.bridges:
            _connect_container(layout, nodes, bridge)
        _settle(nodes.values())
    except BaseException:
        for space in spaces.values():
            space.close()
        raise
    finally:
        for node in nodes.values():
            node.netlink.close()
    return spaces


def _settle(nodes: Iterable[_Node]) -> None:
    """Wait until links and addresses are in use: the kernel gets to that in its own time when it is busy."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    for node in nodes:
        while not node.has_settled() and time.monotonic() < deadline:
            time.sleep(0.002)


def _tentative(listing: str) -> bool:
    """Whether a listing of /proc/net/if_inet6 (proc_pid_net(5)) shows an address that is still being checked."""
    return any(int(line.split()[4], 16) & _IFA_F_TENTATIVE for line in text.lines(listing))


def _connect_peer(layout: Layout, nodes: dict[str, _Node]) -> None:
    host, peer = nodes[HOST], nodes[PEER]
    for family in layout.families:
        peer.answer_for(_EVERYTHING[family])
    for number, uplink in enumerate(layout.uplinks):
        far = far_end(number)
        _cable(host, uplink.name, peer, far)
        if Family.IPV6 in layout.families:
            host.address(uplink.name, HOST_LINK_LOCAL, 64)
            peer.address(far, PEER_LINK_LOCAL, 64)
            # The scope of a link-local address chooses the link; only routes that differ can stand side by side.
            peer.on_link(_LINK_LOCAL, far, metric=1 + number)
        for server in uplink.servers:
            peer.address(far, server, 64)
    for family in layout.families:
        # Nothing but the two is on link, so that the peer answers for their neighbours' addresses too.
        name, own, other = layout.uplinks[0].name, HOST_ADDRESS[family], PEER_ADDRESS[family]
        host.address(name, own, own.max_prefixlen)
        host.on_link(ip_network(other), name)
        peer.address(far_end(0), other, other.max_prefixlen)
        peer.on_link(ip_network(own), far_end(0))
        host.default_route(family, PEER_ADDRESS[family])


def _cable(near: _Node, near_name: str, far: _Node, far_name: str) -> None:
    near.netlink.link("add", ifname=near_name, kind="veth", peer={"ifname": far_name, "net_ns_fd": far.namespace.fd})
    near.up(near_name)
    far.up(far_name)
    near.cabled.append(near_name)
    far.cabled.append(far_name)


def _connect_container(layout: Layout, nodes: dict[str, _Node], bridge: Bridge) -> None:
    host, peer, container = nodes[HOST], nodes[PEER], nodes[bridge.name]
    _cable(host, bridge.name, container, CONTAINER_LINK)
    for network in bridge.networks:
        family = Family.of(network)
        if family not in layout.families:
            continue
        # Through the member, not on link: AnyIP does not answer neighbour discovery for the other addresses.
        host.address(bridge.name, gateway(network), network.max_prefixlen)
        host.on_link(ip_network(member(network)), bridge.name)
        host.via(network, member(network))
        container.address(CONTAINER_LINK, member(network), network.prefixlen)
        container.answer_for(network)
        container.on_link(ip_network(gateway(network)), CONTAINER_LINK)
        container.default_route(family, gateway(network))
        peer.via(network, HOST_ADDRESS[family])

"""What should happen to a host's traffic, independent of the engine.

A `Policy` is complete and immutable: names are resolved to uids, name servers are read, families are decided.
`tpctl.spec.decide` says what a policy means; the engines under `tpctl.engines` make the kernel do it.

>>> Policy(proxy_uid=5678, inbound=Inbound(exclude_ports=(PortRange(22),))).inbound.port
15006
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from socket import AF_INET, AF_INET6, inet_ntop

from tpctl.spec.exclusions import Interfaces, Mark

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

DEFAULT_INBOUND_PORT = 15006
DEFAULT_OUTBOUND_PORT = 15001
DEFAULT_DNS_PORT = 15053
DNS_PORT = 53

MAX_PORT = 65535
MAX_UID = 2**32 - 2
"""(uid_t)-1 means "no user" to the kernel (credentials(7)), so it can own nothing."""


class Family(enum.IntEnum):
    """An IP family; the value is the IP version."""

    IPV4 = 4
    IPV6 = 6

    @classmethod
    def of(cls, thing: Address | Network) -> Family:
        """The family an address or network belongs to."""
        return cls(thing.version)


class Protocol(enum.StrEnum):
    """A transport protocol that a rule can name."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class FamilyAddresses:
    """The two loopback addresses with a special meaning."""

    local: Network
    """Where applications dial themselves; the proxy dials the application here too."""
    passthrough: Network
    """The source from which the proxy dials the application for an inbound connection, so that it is not captured."""


RESERVED = {
    Family.IPV4: FamilyAddresses(ip_network("127.0.0.1/32"), ip_network("127.0.0.6/32")),
    Family.IPV6: FamilyAddresses(ip_network("::1/128"), ip_network("::6/128")),
}
PASSTHROUGH6 = IPv6Address("::6")


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports `first` to `last`, both included; one port when `last` is left out.

    Raises ValueError for a port outside 1..65535 or a reversed range.
    """

    first: int
    last: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "last", self.last or self.first)
        if not 1 <= self.first <= MAX_PORT or not 1 <= self.last <= MAX_PORT:
            raise ValueError(f"{self.first}-{self.last} is not within 1-{MAX_PORT}")
        if self.first > self.last:
            raise ValueError(f"the range {self.first}-{self.last} is reversed")

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


ALL_PORTS = PortRange(1, MAX_PORT)
Ports = tuple[PortRange, ...]


LINK_LOCAL6 = IPv6Network("fe80::/10")
"""Connections that leave for such an address are never redirected: connect(2) binds the socket to the interface of the
address's scope, and the kernel keeps to that interface when REDIRECT has made ::1 of the destination, so the packet is
lost (ip6_route_me_harder in net/ipv6/netfilter.c)."""


def is_scoped(address: Address) -> bool:
    """Whether an address only has a meaning on one interface."""
    return address in LINK_LOCAL6 if isinstance(address, IPv6Address) else False


THIS_HOST: dict[Family, tuple[Network, ...]] = {
    Family.IPV4: (IPv4Network("0.0.0.0/8"), IPv4Network("127.0.0.0/8")),
    Family.IPV6: (IPv6Network("::/127"), IPv6Network("::ffff:0.0.0.0/104"), IPv6Network("::ffff:127.0.0.0/104")),
}
"""Destinations by which connect(2) reaches this host itself: loopback addresses, the unspecified ones, which mean the
same, and those of IPv4 as mapped addresses of IPv6. The kernel accepts none of them from another host
(ip_route_input_slow() in net/ipv4/route.c, ip6_rcv_core() in net/ipv6/ip6_input.c). But NAT comes before that test, and
a data plane dials what the packet asked for. Other addresses that only lo has, such as an anycast address or one of
scope host, are not among them: the kernel lets other hosts reach those."""


def means_this_host(address: Address) -> bool:
    """Whether a connection to the address stays within this host, wherever it is opened."""
    return contains(THIS_HOST[Family.of(address)], address)


def includes(ports: Iterable[PortRange], port: int | None) -> bool:
    """Whether `port` lies in any of the ranges."""
    return any(port in candidate for candidate in ports)


@dataclass(frozen=True, slots=True, order=True)
class UidRange:
    """User ids `first` to `last`, both included; one id when `last` is left out. Ids are 32 bit."""

    first: int
    last: int = -1

    def __post_init__(self) -> None:
        if self.last == -1:
            object.__setattr__(self, "last", self.first)
        if not 0 <= self.first <= MAX_UID or not 0 <= self.last <= MAX_UID:
            raise ValueError(f"{self.first}-{self.last} is not within 0-{MAX_UID}")
        if self.first > self.last:
            raise ValueError(f"the range {self.first}-{self.last} is reversed")

    def __contains__(self, uid: object) -> bool:
        return isinstance(uid, int) and self.first <= uid <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class UidExclusion:
    """Connections of these users to these ports are left alone."""

    protocol: Protocol
    ports: Ports
    uids: UidRange

    def __str__(self) -> str:
        return f"{self.protocol}:{','.join(map(str, self.ports))}:{self.uids}"


@dataclass(frozen=True, slots=True)
class NameServer:
    """A server of resolv.conf; `interface` is the scope of a link-local address (fe80::1%eth0)."""

    address: Address
    interface: str | None = None

    def __str__(self) -> str:
        return f"{self.address}%{self.interface}" if self.interface else str(self.address)


@dataclass(frozen=True, slots=True)
class VirtualNetwork:
    """A bridge whose containers or VMs are redirected as if they were local applications.

    `interface` may end in `+`, which matches every interface whose name begins with the rest, as in iptables(8).
    """

    interface: str
    network: Network

    def carries(self, interface: str) -> bool:
        """Whether packets of `interface` belong to this network."""
        return interface in Interfaces(self.interface)

    def __str__(self) -> str:
        return f"{self.interface}:{self.network}"


class Redirection(enum.StrEnum):
    """How a connection is handed to the data plane."""

    REDIRECT = "redirect"
    """Its destination becomes the listener's; the data plane asks for the one it had with SO_ORIGINAL_DST."""
    TPROXY = "tproxy"
    """It keeps its destination, which becomes the accepted socket's own address (getsockname(2)). No NAT."""


@dataclass(frozen=True, slots=True)
class Inbound:
    """Connections that arrive from other hosts."""

    enabled: bool = True
    port: int = DEFAULT_INBOUND_PORT
    include_ports: Ports = ()
    """When not empty, only these are redirected and `exclude_ports` has no effect."""
    exclude_ports: Ports = ()
    exclude_sources: tuple[Network, ...] = ()
    insert: bool = False
    """Run before, not after, other software's rules of the same chain."""
    mode: Redirection = Redirection.REDIRECT

    @property
    def is_transparent(self) -> bool:
        """Whether anything is handed over by TPROXY, and the data plane may dial from the client's own address."""
        return self.enabled and self.mode is Redirection.TPROXY


@dataclass(frozen=True, slots=True)
class Outbound:
    """Connections that this host opens."""

    enabled: bool = True
    port: int = DEFAULT_OUTBOUND_PORT
    include_ports: Ports = ()
    """When not empty, only these are redirected and `exclude_ports` has no effect."""
    exclude_ports: Ports = ()
    exclude_destinations: tuple[Network, ...] = ()
    exclude_uids: tuple[UidExclusion, ...] = ()
    exclude_marks: tuple[Mark, ...] = ()
    """Sockets with such a mark (SO_MARK, socket(7)) are left alone, their DNS queries too."""
    insert: bool = False
    """Run before, not after, other software's rules of the same chain."""


class DnsCapture(enum.StrEnum):
    """Which DNS queries go to the data plane."""

    OFF = "off"
    LISTED = "listed"
    """Those to the name servers of resolv.conf."""
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Dns:
    """DNS queries that this host makes, and those of virtual networks."""

    capture: DnsCapture = DnsCapture.OFF
    port: int = DEFAULT_DNS_PORT
    servers: tuple[NameServer, ...] = ()
    """Only meaningful for `DnsCapture.LISTED`."""
    tcp: bool = False
    """Redirect DNS over TCP too; otherwise it passes, because the data plane's DNS listener is usually UDP only."""
    split_zones: bool = True
    """Keep the data plane's own queries in another conntrack zone than the applications' (docs/architecture.md)."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A control group of the unified hierarchy (cgroups(7)), with all groups below it: a service, or several."""

    path: str
    """From the root of the hierarchy, without a leading slash: system.slice/app.service."""
    number: int
    """The kernel's number for it, which is its directory's inode: a restarted service has a new group."""

    @property
    def level(self) -> int:
        """How deep it lies; the root's children are at level 1."""
        return self.path.count("/") + 1

    def holds(self, path: str | None) -> bool:
        """Whether the group of that path is this one, or one below it."""
        return path is not None and f"{path}/".startswith(f"{self.path}/")

    def __str__(self) -> str:
        return self.path


class WhenProxyDown(enum.StrEnum):
    """What happens to a connection that would be redirected while nothing listens on the data plane's port."""

    BLOCK = "block"
    """It is refused: nothing gets past the data plane."""
    BYPASS = "bypass"
    """It goes straight to where it was going."""


class BoundSockets(enum.StrEnum):
    """What happens to a connection that would be redirected and whose socket is bound to an interface.

    SO_BINDTODEVICE (socket(7)) does that; `curl --interface`, VPN clients and agents of multi-homed hosts use it.
    """

    REDIRECT = "redirect"
    """It is redirected where the interface leads to the data plane (`tpctl.change.device_routes`), and else dropped."""
    PASS = "pass"  # noqa: S105 - no password
    """It goes straight to where it was going."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything that decides where a connection goes."""

    proxy_uid: int
    """The user the data plane runs as: its own connections are not captured."""
    families: frozenset[Family] = frozenset(Family)
    loopback: str = "lo"
    inbound: Inbound = field(default_factory=Inbound)
    outbound: Outbound = field(default_factory=Outbound)
    dns: Dns = field(default_factory=Dns)
    virtual_networks: tuple[VirtualNetwork, ...] = ()
    exclude_interfaces: tuple[Interfaces, ...] = ()
    """What arrives or leaves by them is left alone. None of them is the loopback interface."""
    drop_invalid: bool = False
    """Drop packets that conntrack cannot place, so that the application does not answer them with a reset."""
    guard_ports: bool = True
    """Reset connections that are opened to the data plane's own ports (`tpctl.spec.guard`)."""
    log_level: int | None = None
    """Kernel log level (syslog(2), 0-7) for a line a connection; None logs nothing."""
    when_proxy_down: WhenProxyDown = WhenProxyDown.BLOCK
    cgroup: Cgroup | None = None
    """Only connections that processes in this group open are redirected; None means those of every process."""
    bound_sockets: BoundSockets = BoundSockets.REDIRECT
    """Follows from the engine; see `through`."""

    def through(self, engine: str) -> Policy:
        """The policy as that engine carries it out.

        Netfilter does not see what a socket is bound to. eBPF programs do, but nothing would stop their packets for the
        data plane from leaving by an interface that does not lead there.
        """
        return replace(self, bound_sockets=BoundSockets.PASS if engine == "ebpf" else BoundSockets.REDIRECT)

    def excludes(self, interface: str | None) -> bool:
        """Whether what arrives or leaves by an interface of that name is left alone."""
        return any(interface in excluded for excluded in self.exclude_interfaces)

    def redirects_own(self, family: Family) -> bool:
        """Whether any connection or query that processes of this host open is redirected to a loopback address."""
        return family in self.families and (self.outbound.enabled or self.captures_dns(family))

    def servers(self, family: Family) -> tuple[NameServer, ...]:
        """The name servers of a family whose queries can be captured, in the order of resolv.conf."""
        return tuple(
            server
            for server in self.dns.servers
            if Family.of(server.address) is family and not is_scoped(server.address)
        )

    def networks(self, family: Family) -> tuple[VirtualNetwork, ...]:
        """The virtual networks of a family, in the order their rules stand: by interface name."""
        mine = (vnet for vnet in self.virtual_networks if Family.of(vnet.network) is family)
        return tuple(sorted(mine, key=lambda vnet: vnet.interface))

    def captures_dns(self, family: Family) -> bool:
        """Whether any DNS query of the family goes to the data plane (virtual networks apart)."""
        if self.dns.capture is DnsCapture.LISTED:
            return bool(self.servers(family))
        return self.dns.capture is DnsCapture.ALL

    def splits_zones(self, family: Family) -> bool:
        """Whether the family's DNS traffic is put into conntrack zones."""
        return self.dns.split_zones and self.captures_dns(family)


def text_of(network: Network) -> str:
    """The network as the tools of the kernel write it, which show the end of a mapped address as one of IPv4."""
    family = AF_INET if network.version == 4 else AF_INET6
    return f"{inet_ntop(family, network.network_address.packed)}/{network.prefixlen}"


def of_family(items: Iterable[Network], family: Family) -> Iterator[Network]:
    """Those of `items` that belong to `family`, in order."""
    return (item for item in items if Family.of(item) is family)


def contains(networks: Iterable[Network], address: Address) -> bool:
    """Whether `address` lies in any of the networks; a network of the other family never contains it."""
    return any(address in network for network in networks if network.version == address.version)

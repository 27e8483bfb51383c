"""The policies whose plans are broken on purpose: together they have every rule, and no rule hides another."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from tests.equivalence.policies import SERVICE
from tpctl.spec.exclusions import Interfaces, Mark
from tpctl.spec.policy import (
    ALL_PORTS,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    Redirection,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

_DOCKER = (VirtualNetwork("docker0", ip_network("10.44.0.0/24")), VirtualNetwork("docker0", ip_network("fd44::/64")))
_BRIDGES = (VirtualNetwork("br+", ip_network("172.30.0.0/16")), VirtualNetwork("br+", ip_network("fd01::/64")))


def _servers(*texts: str) -> tuple[NameServer, ...]:
    return tuple(NameServer(ip_address(text)) for text in texts)


_EXCLUSIONS = Policy(
    proxy_uid=5678,
    inbound=Inbound(
        exclude_ports=(PortRange(22), PortRange(8000, 8010), PortRange(9443)),
        exclude_sources=(ip_network("203.0.113.64/26"), ip_network("2001:db8:6::/48")),
    ),
    outbound=Outbound(
        exclude_ports=(PortRange(443), PortRange(6000, 6010)),
        exclude_destinations=(ip_network("198.51.100.64/26"), ip_network("2001:db8:8::/48")),
        exclude_uids=(
            UidExclusion(Protocol.TCP, (PortRange(3306), PortRange(5000, 5005)), UidRange(2000, 2010)),
            UidExclusion(Protocol.TCP, (ALL_PORTS,), UidRange(3000)),
            UidExclusion(Protocol.UDP, (PortRange(53),), UidRange(4000, 4010)),
        ),
    ),
    dns=Dns(
        DnsCapture.LISTED,
        servers=(
            *_servers("10.0.0.53", "10.44.0.2", "127.0.0.53", "198.51.100.70"),
            *_servers("2001:db8::53", "2001:db8:8::53", "::1"),
        ),
    ),
    virtual_networks=_DOCKER,
    drop_invalid=True,
)
_INCLUSIONS = Policy(
    proxy_uid=1500,
    inbound=Inbound(include_ports=(PortRange(80), PortRange(8000, 8080), PortRange(53)), insert=True),
    outbound=Outbound(
        include_ports=(PortRange(443), PortRange(5000, 5100), PortRange(53, 54)),
        exclude_destinations=(ip_network("198.51.100.64/26"), ip_network("2001:db8:8::/48")),
        exclude_uids=(UidExclusion(Protocol.UDP, (PortRange(53),), UidRange(4000, 4010)),),
        insert=True,
    ),
    dns=Dns(DnsCapture.ALL, tcp=True),
    virtual_networks=_BRIDGES,
)
_INBOUND_OFF = Policy(
    proxy_uid=5678,
    families=frozenset({Family.IPV4}),
    inbound=Inbound(enabled=False),
    outbound=Outbound(exclude_uids=(UidExclusion(Protocol.TCP, (ALL_PORTS,), UidRange(2000, 2010)),)),
    dns=Dns(DnsCapture.LISTED, servers=_servers("10.0.0.53", "127.0.0.1"), tcp=True),
    virtual_networks=_DOCKER,
)
_OUTBOUND_OFF = Policy(
    proxy_uid=5678,
    inbound=Inbound(exclude_ports=(PortRange(22),)),
    outbound=Outbound(enabled=False),
    dns=Dns(DnsCapture.ALL, split_zones=False),
    virtual_networks=(*_BRIDGES, *_DOCKER),
    drop_invalid=True,
    log_level=7,
)
_PLAIN = Policy(proxy_uid=5678, virtual_networks=_DOCKER)
_ONE_SERVICE = Policy(
    proxy_uid=5678,
    inbound=Inbound(include_ports=(PortRange(8080),)),
    outbound=Outbound(insert=True),
    dns=Dns(DnsCapture.LISTED, servers=_servers("10.0.0.53", "2001:db8::53"), tcp=True),
    cgroup=SERVICE,
)
_TPROXY = Policy(
    proxy_uid=5678,
    inbound=Inbound(
        exclude_ports=(PortRange(22), PortRange(8000, 8010)),
        exclude_sources=(ip_network("203.0.113.64/26"), ip_network("2001:db8:6::/48")),
        mode=Redirection.TPROXY,
    ),
    dns=Dns(DnsCapture.LISTED, servers=_servers("10.0.0.53", "2001:db8::53")),
    virtual_networks=_DOCKER,
)
_TPROXY_FIRST = Policy(
    proxy_uid=5678,
    families=frozenset({Family.IPV4}),
    inbound=Inbound(
        include_ports=(PortRange(80), PortRange(8000, 8080), PortRange(53)), insert=True, mode=Redirection.TPROXY
    ),
    dns=Dns(tcp=True),
    virtual_networks=_BRIDGES,
)

_LEFT_ALONE = Policy(
    proxy_uid=5678,
    inbound=Inbound(exclude_ports=(PortRange(22),)),
    outbound=Outbound(exclude_marks=(Mark(0x80000, 0xFF0000), Mark(51820))),
    dns=Dns(DnsCapture.ALL, tcp=True),
    virtual_networks=_BRIDGES,
    exclude_interfaces=(Interfaces("tun0"), Interfaces("br1+")),
    drop_invalid=True,
)
POLICIES = (
    _EXCLUSIONS,
    _INCLUSIONS,
    _INBOUND_OFF,
    _OUTBOUND_OFF,
    _PLAIN,
    _ONE_SERVICE,
    _TPROXY,
    _TPROXY_FIRST,
    _LEFT_ALONE,
)

"""Whether this kernel has everything the nftables engine uses."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address, ip_network

from agent.engines.nftables.nft import Nft, NftError
from agent.engines.nftables.ruleset import table_for
from agent.engines.nftables.table import FAMILY, NAME
from agent.errors import HostError
from agent.policy import (
    ALL_PORTS,
    Dns,
    DnsCapture,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

EVERYTHING = Policy(
    proxy_uid=5678,
    inbound=Inbound(exclude_ports=(PortRange(22),), exclude_sources=(ip_network("192.0.2.0/24"),)),
    outbound=Outbound(
        exclude_ports=(PortRange(22, 23),),
        exclude_destinations=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")),
        exclude_uids=tuple(UidExclusion(protocol, (ALL_PORTS,), UidRange(1, 2)) for protocol in Protocol),
    ),
    dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("192.0.2.1")),)),
    virtual_networks=(VirtualNetwork("br+", ip_network("192.0.2.0/24")),),
    drop_invalid=True,
    log_level=7,
)
"""A policy that needs every expression the engine ever uses."""

_PROBE_NAME = f"{NAME}_probe"
_NEEDS = "Linux 5.2 or later with nf_tables, NAT of the inet family, conntrack zones, fib and log"


def require(nft: Nft) -> None:
    """Let the kernel judge a table with every expression, without carrying it out. Raises HostError."""
    text = dataclasses.replace(table_for(EVERYTHING), where=f"{FAMILY} {_PROBE_NAME}").render()
    try:
        nft.check(text)
    except NftError as refused:
        raise HostError(
            f"the nftables engine does not work here: {nft.description} says {refused}. "
            f"It needs root and {_NEEDS}; use --engine iptables instead"
        ) from refused

"""Whether this kernel has everything the nftables engine uses."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from tpctl.engines import refused
from tpctl.engines.nftables.nft import Nft, NftError
from tpctl.engines.nftables.ruleset import table_for, without_nat
from tpctl.engines.nftables.table import FAMILY, NAME, Table
from tpctl.spec.exclusions import Interfaces, Mark
from tpctl.spec.policy import (
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
from tpctl.system.errors import HostError

EVERYTHING = Policy(
    proxy_uid=5678,
    inbound=Inbound(exclude_ports=(PortRange(22),), exclude_sources=(ip_network("192.0.2.0/24"),)),
    outbound=Outbound(
        exclude_ports=(PortRange(22, 23),),
        exclude_destinations=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")),
        exclude_uids=tuple(UidExclusion(protocol, (ALL_PORTS,), UidRange(1, 2)) for protocol in Protocol),
        exclude_marks=(Mark(1, 3),),
    ),
    dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("192.0.2.1")),)),
    virtual_networks=(VirtualNetwork("br+", ip_network("192.0.2.0/24")),),
    exclude_interfaces=(Interfaces("wg+"),),
    drop_invalid=True,
    log_level=7,
)
"""A policy that needs every expression the engine ever uses."""

_PROBE_NAME = f"{NAME}_probe"
_NEEDS = "Linux 5.2 or later with nf_tables, NAT of the inet family, conntrack zones, fib and log"


class Kernel(NamedTuple):
    """What a kernel lacks that the engine can do without."""

    translates: bool = True
    """Whether it has more of NAT than REDIRECT: that is a module of its own (CONFIG_NFT_NAT)."""
    guard_obstacle: str | None = None
    """Why the data plane's own ports cannot be guarded."""


COMPLETE = Kernel()


def require(nft: Nft) -> Kernel:
    """Let the kernel judge a table with every expression, without carrying it out. Raises HostError."""
    everything = table_for(EVERYTHING)
    if _refused(nft, everything) is None:
        return COMPLETE
    unguarded = table_for(dataclasses.replace(EVERYTHING, guard_ports=False))
    error = _refused(nft, without_nat(unguarded))
    if error:
        raise refused.cause_in_nf_tables(str(error)) or HostError(
            f"the nftables engine does not work here: {nft.description} says {error}. "
            f"It needs root and {_NEEDS}; use --engine iptables instead"
        ) from error
    obstacle = _refused(nft, without_nat(everything))
    return Kernel(
        translates=_refused(nft, unguarded) is None,
        guard_obstacle=f"{nft.description} says {obstacle}" if obstacle else None,
    )


def _refused(nft: Nft, table: Table) -> NftError | None:
    try:
        nft.check(table._replace(where=f"{FAMILY} {_PROBE_NAME}").render())
    except NftError as refused:
        return refused
    return None

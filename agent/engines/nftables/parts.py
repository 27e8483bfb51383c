"""What rules are made of: matches in nft's language, and the sets they look things up in. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agent.engines.nftables import cgroup
from agent.engines.nftables.intervals import merged_networks, merged_ports, merged_uids
from agent.engines.nftables.table import Set
from agent.errors import InputError
from agent.policy import (
    DNS_PORT,
    LINK_LOCAL6,
    DnsCapture,
    Family,
    Network,
    Policy,
    Ports,
    Protocol,
    UidExclusion,
    VirtualNetwork,
    includes,
)

SYN = "tcp flags & (fin | syn | rst | ack) == syn"
"""Only a connection's first segment is redirected: on a host whose conntrack was idle, running connections look new."""
TCP = "meta l4proto tcp"
QUERY = f"udp dport {DNS_PORT}"
ADDRESS = {Family.IPV4: "ip", Family.IPV6: "ip6"}


def join(*parts: str) -> str:
    """The parts of a match that are not empty."""
    return " ".join(part for part in parts if part)


def redirect_to(port: int) -> str:
    """The action that sends a connection to a port of this host; the rule must match the protocol."""
    return f"redirect to :{port}"


def interface(name: str) -> str:
    """An interface pattern of iptables(8) (`br+`) in nft's language; empty when it means every interface."""
    if name == "+":
        return ""
    if '"' in name or "\\" in name or "\n" in name:
        raise InputError(f"the interface {name!r} has a character that nft cannot read")
    if name.endswith("+"):
        return f'"{name[:-1]}*"'
    # Only a last asterisk is a wildcard to nft, and a backslash takes that away.
    return f'"{name[:-1]}\\*"' if name.endswith("*") else f'"{name}"'


def arrives_at(vnet: VirtualNetwork) -> str:
    """Matches what arrives on the interfaces of a virtual network."""
    name = interface(vnet.interface)
    return f"iifname {name}" if name else ""


class Parts:
    """The matches of one policy. Keeps the sets they refer to."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.families = tuple(sorted(policy.families))
        self.sets: dict[str, Set] = {}
        self.owner = f"meta skuid {policy.proxy_uid}"
        self.inside = cgroup.match(policy.cgroup) if policy.cgroup else ""
        """Matches packets of sockets that were made in the policy's control group."""
        self.whose = f": c1, of the cgroup {policy.cgroup}" if policy.cgroup else ""
        """What a comment adds to a rule with that match."""

    @property
    def splitting(self) -> tuple[Family, ...]:
        """The families whose DNS traffic is put into zones."""
        return tuple(family for family in self.families if self.policy.splits_zones(family))

    @property
    def capturing(self) -> tuple[Family, ...]:
        """The families whose DNS queries are captured."""
        return tuple(family for family in self.families if self.policy.captures_dns(family))

    def guard(self, families: Iterable[Family] | None = None) -> str:
        """Keeps a rule to some families; a family the policy leaves alone is never touched."""
        chosen = self.families if families is None else tuple(families)
        return "" if len(chosen) == len(Family) else self.nfproto(chosen[0])

    def nfproto(self, family: Family) -> str:
        """Matches a family."""
        return f"meta nfproto ipv{family.value}"

    def servers(self, families: tuple[Family, ...], side: str) -> Iterator[str]:
        """Matches that together cover the captured servers, as source or destination (`side`)."""
        for family in families:
            ip = ADDRESS[family]
            if self.policy.dns.capture is DnsCapture.LISTED:
                servers = tuple(dict.fromkeys(str(server.address) for server in self.policy.servers(family)))
                yield f"{ip} {side} {self.define(f'name_servers_v{family.value}', address_type(family), servers)}"
            elif family is Family.IPV6:
                yield f"{ip} {side} != {LINK_LOCAL6}"  # s1
            else:
                yield self.nfproto(family)

    def excluded_destinations(self) -> Iterator[str]:
        """Matches that together cover the excluded destinations, one a family."""
        return self.networks("excluded_destinations", self.policy.outbound.exclude_destinations, "daddr")

    def networks(self, name: str, networks: Iterable[Network], side: str) -> Iterator[str]:
        """Matches that together cover networks, one a family, as source or destination (`side`)."""
        wanted = tuple(networks)
        for family in self.families:
            merged = merged_networks(wanted, family)
            if merged:
                elements = self.define(f"{name}_v{family.value}", address_type(family), map(str, merged))
                yield f"{ADDRESS[family]} {side} {elements}"

    def ports(self, name: str, ports: Ports) -> str:
        """Matches destination ports of TCP, by one set."""
        return f"tcp dport {self.define(name, 'inet_service', map(str, merged_ports(ports)))}"

    def dns_excluded_uids(self) -> Iterator[str]:
        """Matches the users whose DNS queries over UDP are excluded, if there are any."""
        uids = merged_uids(item.uids for item in self.policy.outbound.exclude_uids if _covers_dns(item))
        if uids:
            yield f"meta skuid {self.define('dns_excluded_uids', 'uid', map(str, uids))}"

    def define(self, name: str, kind: str, elements: Iterable[str]) -> str:
        """Keep a set of the table; hands back how a rule refers to it."""
        made = Set(name, kind, tuple(elements))
        # Different sets never share a name: a new one is filled before the rules look into it (`preparation`).
        made = Set(f"{name}_{made.digest}", kind, made.elements)
        self.sets[made.name] = made
        return f"@{made.name}"


def _covers_dns(item: UidExclusion) -> bool:
    return item.protocol is Protocol.UDP and includes(item.ports, DNS_PORT)


def address_type(family: Family) -> str:
    """The type of a set of addresses."""
    return f"ipv{family.value}_addr"

"""What rules are made of: matches in nft's language, and the sets they look things up in. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tpctl.engines.nftables import cgroup
from tpctl.engines.nftables.intervals import merged_networks, merged_ports, merged_uids
from tpctl.engines.nftables.table import Rule, Set
from tpctl.spec.exclusions import MAX_MARK, Interfaces
from tpctl.spec.policy import (
    DNS_PORT,
    LINK_LOCAL6,
    THIS_HOST,
    DnsCapture,
    Family,
    Network,
    Policy,
    Ports,
    Protocol,
    UidExclusion,
    VirtualNetwork,
    includes,
    text_of,
)
from tpctl.system.errors import InputError

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


def translate_to(family: Family, port: int) -> str:
    """The action that sends a connection to another port of the address it goes to; the rule must match both protocols.

    `dnat to :PORT` would serve both families at once, but not with nft 0.9.8 (Debian 11), nor before Linux 5.14.
    """
    ip = ADDRESS[family]
    return f"dnat {ip} to {ip} daddr:{port}"


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
                elements = self.define(f"{name}_v{family.value}", address_type(family), map(text_of, merged))
                yield f"{ADDRESS[family]} {side} {elements}"

    def from_outside(self) -> Iterator[Rule]:
        """Rules that end a base chain for what arrives by another interface than loopback for a loopback address."""
        away = f"iifname != {interface(self.policy.loopback)}"
        here = (network for family in self.families for network in THIS_HOST[family])
        for match in self.networks("this_host", here, "daddr"):
            yield Rule(join(away, match), "return", "l1: loopback addresses are left to the kernel")

    def excluded_arrivals(self) -> Iterator[Rule]:
        """Rules that end a chain for what arrives by an excluded interface."""
        for excluded in self.policy.exclude_interfaces:
            match = join(self.guard(), f"iifname {interface(excluded.pattern)}")
            yield Rule(match, "return", f"e1: excluded interface {excluded}")

    def excluded_departures(self) -> Iterator[tuple[str, str]]:
        """Matches for what leaves by an excluded interface, or has an excluded mark, each with its rule's comment."""
        for excluded in self.policy.exclude_interfaces:
            yield f"oifname {interface(excluded.pattern)}", f"e1: excluded interface {excluded}"
        for mark in self.policy.outbound.exclude_marks:
            bits = "" if mark.mask == MAX_MARK else f"& {mark.mask:#x} == "
            yield f"meta mark {bits}{mark.value:#x}", f"m1: excluded mark {mark}"

    def reset(self, text: str) -> Iterator[Rule]:
        """Rules that refuse a TCP connection.

        The kernel routes a reset to a link-local client without its interface (nf_send_reset6() in
        net/ipv6/netfilter/nf_reject_ipv6.c), so on a host with several links it may leave by another one. An ICMP
        error keeps to the link, and refuses a connection as well. Not over loopback, where the error finds no socket
        that is bound to a link, as those with link-local addresses are.
        """
        if Family.IPV6 in self.families:
            away = f"oifname != {interface(self.policy.loopback)}"
            yield Rule(join(away, TCP, f"ip6 saddr {LINK_LOCAL6}"), "reject", text)
        yield Rule(TCP, "reject with tcp reset", text)

    def carried_by(self, vnet: VirtualNetwork) -> str:
        """Matches what arrives on the interfaces of a virtual network, less those of them that are excluded."""
        some = (each for each in self.policy.exclude_interfaces if each.meets(Interfaces(vnet.interface)))
        return join(arrives_at(vnet), *(f"iifname != {interface(each.pattern)}" for each in some))

    def ports(self, name: str, ports: Ports) -> str:
        """Matches destination ports of TCP, by one set."""
        return f"tcp dport {self.define(name, 'inet_service', map(str, merged_ports(ports)))}"

    def dns_excluded_uids(self) -> Iterator[str]:
        """Matches the users whose DNS queries over UDP are excluded, if there are any."""
        uids = merged_uids(item.uids for item in self.policy.outbound.exclude_uids if _covers_dns(item))
        if uids:
            yield f"meta skuid {self.define('dns_excluded_uids', 'uid', map(str, uids))}"

    def one_or_set(self, name: str, kind: str, elements: Sequence[object]) -> str:
        """How a rule refers to the elements: a set, unless there is only one. Thousands of sets take minutes."""
        return str(elements[0]) if len(elements) == 1 else self.define(name, kind, map(str, elements))

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

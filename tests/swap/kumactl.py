"""Rulesets with the structure of `kumactl install transparent-proxy`'s (docs/ruleset.md), for iptables-restore.

Order, chains, matches and the prefix of the comments are kumactl's; redirects are not limited to SYN, DNS and
exclusions stand in OUTPUT itself. The data plane's user is `PROXY`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.swap.traffic import PROXY
from tpctl.spec.policy import RESERVED, Family

DNS_PORT = 15053
_CHAINS = ("KUMA_MESH_INBOUND", "KUMA_MESH_OUTBOUND", "KUMA_MESH_INBOUND_REDIRECT", "KUMA_MESH_OUTBOUND_REDIRECT")


def ruleset(family: Family, *, full: bool = False) -> str:
    """The restore text of one family: a default install, or (`full`) one with all DNS, exclusions and zones."""
    tables = {"raw": list(_raw())} if full else {}
    tables["nat"] = [f"-N {chain}" for chain in _CHAINS] + list(_nat(family, full))
    if full:
        tables["mangle"] = [f"-A PREROUTING -m conntrack --ctstate INVALID {_comment('drop invalid')} -j DROP"]
    return "".join(f"*{name}\n" + "\n".join(rules) + "\nCOMMIT\n" for name, rules in tables.items())


def _comment(text: str) -> str:
    return f'-m comment --comment "kuma/mesh/transparent/proxy/{text}"'


def _raw() -> Iterator[str]:
    query, answer = "-p udp -m udp --dport 53", "-p udp -m udp --sport"
    owner = f"-m owner --uid-owner {PROXY}"
    yield f"-A OUTPUT {query} {owner} {_comment('zone 1: the data plane asks')} -j CT --zone 1"
    yield f"-A OUTPUT {answer} {DNS_PORT} {owner} {_comment('zone 2: the data plane answers')} -j CT --zone 2"
    yield f"-A OUTPUT {query} {_comment('zone 2: requests')} -j CT --zone 2"
    yield f"-A PREROUTING {answer} 53 {_comment('zone 1: responses')} -j CT --zone 1"


def _nat(family: Family, full: bool) -> Iterator[str]:
    yield f"-A PREROUTING -p tcp {_comment('inbound')} -j KUMA_MESH_INBOUND"
    if full:
        yield from _output_inserts(family)
    yield f"-A OUTPUT -p tcp {_comment('outbound')} -j KUMA_MESH_OUTBOUND"
    if full:
        yield f"-A KUMA_MESH_INBOUND -p tcp -m tcp --dport 22 {_comment('excluded port')} -j RETURN"
    yield f"-A KUMA_MESH_INBOUND -p tcp {_comment('everything else')} -j KUMA_MESH_INBOUND_REDIRECT"
    yield from _outbound(family, full)
    for chain, port in (("INBOUND", 15006), ("OUTBOUND", 15001)):
        target = f"-j REDIRECT --to-ports {port}"
        yield f"-A KUMA_MESH_{chain}_REDIRECT -p tcp {_comment(f'to envoy (port {port})')} {target}"


def _output_inserts(family: Family) -> Iterator[str]:
    excluded = "10.0.0.1/32" if family is Family.IPV4 else "fd00::/8"
    yield (
        "-I OUTPUT 1 -p tcp -m multiport --dports 53,3000:5000 -m owner --uid-owner 106-108 "
        f"{_comment('excluded users')} -j RETURN"
    )
    yield f"-I OUTPUT 2 -d {excluded} {_comment('excluded address')} -j RETURN"
    text = _comment("the data plane's own requests")
    yield f"-I OUTPUT 3 -p udp -m udp --dport 53 -m owner --uid-owner {PROXY} {text} -j RETURN"
    yield f"-I OUTPUT 4 -p udp -m udp --dport 53 {_comment('all DNS')} -j REDIRECT --to-ports {DNS_PORT}"
    yield f"-A OUTPUT -p tcp -m tcp --dport 53 -m owner ! --uid-owner {PROXY} {_comment('DNS over TCP')} -j RETURN"


def _outbound(family: Family, full: bool) -> Iterator[str]:
    local, passthrough = RESERVED[family].local, RESERVED[family].passthrough
    chain, owner = "-A KUMA_MESH_OUTBOUND", f"-m owner --uid-owner {PROXY}"
    not_dns = "-m tcp ! --dport 53 " if full else ""
    if full:
        yield f"{chain} -p tcp -m tcp --dport 22 {_comment('excluded port')} -j RETURN"
    yield f"{chain} -s {passthrough} -o lo {_comment('no loops')} -j RETURN"
    yield f"{chain} ! -d {local} -o lo -p tcp {not_dns}{owner} {_comment('self')} -j KUMA_MESH_INBOUND_REDIRECT"
    yield f"{chain} -o lo -p tcp {not_dns}-m owner ! --uid-owner {PROXY} {_comment('loopback')} -j RETURN"
    yield f"{chain} {owner} {_comment('the data plane')} -j RETURN"
    yield f"{chain} -d {local} {_comment('this host')} -j RETURN"
    yield f"{chain} {_comment('everything else')} -j KUMA_MESH_OUTBOUND_REDIRECT"

"""Mutations of the nftables engine's plan."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from ipaddress import ip_network

from tests.equivalence.mutant import Mutant, Spot, name_of, unseen
from tests.equivalence.mutations_iptables import off_by_one, other_groups, shifted
from tpctl.engines.nftables import cgroup
from tpctl.engines.nftables.engine import NftablesPlan
from tpctl.engines.nftables.parts import SYN
from tpctl.engines.nftables.table import Chain, Rule, Set, Table
from tpctl.spec.policy import Cgroup, Family, Policy

_CONDITIONS = {
    "SYN": re.escape(SYN),
    "local": r"fib daddr type (?:!= )?local",
    "local source": r"fib saddr type (?:!= )?local",
    "connection mark": r"ct mark & 0x\w+ == 0x\w+",
    "direction": r"ct direction \w+",
    "translated": r"ct status dnat",
    "owner": r"meta skuid (?!vmap)\S+",
    "family": r"meta nfproto ipv[46]",
    "in": r'iifname (?:!= )?"[^"]*"',
    "out": r'oifname (?:!= )?"[^"]*"',
    "port": r"(?:tcp|udp) [ds]port @?\w+",
    "source": r"ip6? saddr (?:!= )?\S+",
    "destination": r"ip6? daddr (?:!= )?\S+",
    "state": r"ct state (?:invalid|new)",
    "mark": r"meta mark (?:& 0x\w+ == )?0x\w+",
    "cgroup": r'socket cgroupv2 level \d+ "[^"]*"',
}
_NEEDED = "port"
"""A rule that redirects must name a transport protocol."""

Change = tuple[str, str, str, Rule | None]


def mutants(plan: NftablesPlan, policy: Policy) -> Iterator[Mutant]:
    """Every mutation of a plan."""
    table = plan.table
    for kind, spot, became, broken in (*_of_chains(table), *_of_sets(table)):
        reason = unseen(policy, kind, spot) or _nft_only(policy, kind, spot, table)
        yield Mutant(kind, spot, plan._replace(table=broken), became, reason)
    if plan.cgroup:
        for path in other_groups(plan.cgroup.path):
            yield _for_another(plan, plan.cgroup, Cgroup(path, 0))


def _for_another(plan: NftablesPlan, right: Cgroup, wrong: Cgroup) -> Mutant:
    """All rules are for the same group: nft finds only one by its path (`tpctl.engines.nftables.cgroup`)."""
    chains = tuple(
        chain._replace(
            rules=tuple(
                rule._replace(match=rule.match.replace(cgroup.match(right), cgroup.match(wrong)))
                for rule in chain.rules
            ),
        )
        for chain in plan.table.chains
    )
    broken = plan._replace(table=plan.table._replace(chains=chains), cgroup=wrong)
    return Mutant("wrong cgroup", Spot("c1", "cgroup", text=cgroup.match(right)), broken, cgroup.match(wrong))


def _of_chains(table: Table) -> Iterator[tuple[str, Spot, str, Table]]:
    for place, chain in enumerate(table.chains):
        for kind, spot, became, rules in _of_chain(chain):
            chains = (*table.chains[:place], chain._replace(rules=rules), *table.chains[place + 1 :])
            yield kind, spot, became, table._replace(chains=chains)


def _of_chain(chain: Chain) -> Iterator[tuple[str, Spot, str, tuple[Rule, ...]]]:
    rules = chain.rules
    for place, rule in enumerate(rules):
        for kind, part, more, broken in _changes(rule):
            between = () if broken is None else (broken,)
            became = broken.render(comments=False) if broken else "nothing"
            yield kind, _spot(chain, rule, part, more), became, rules[:place] + between + rules[place + 1 :]
    for place, (first, second) in enumerate(itertools.pairwise(rules)):
        if _commute(first, second):
            continue
        swapped = (*rules[:place], second, first, *rules[place + 2 :])
        spot = _spot(chain, first, "rule", name_of(second.comment))
        yield "swap two rules", spot, f"after {second.render(comments=False)}", swapped


def _spot(chain: Chain, rule: Rule, part: str, more: str) -> Spot:
    text = rule.render(comments=False)
    return Spot(name_of(rule.comment), part, _family(text), chain.name, text, more)


def _family(text: str) -> Family | None:
    if "ip6 " in text or "ipv6" in text or "_v6" in text:
        return Family.IPV6
    return Family.IPV4 if "ip " in text or "ipv4" in text or "_v4" in text else None


def _commute(first: Rule, second: Rule) -> bool:
    """Whether the order makes no difference: they do the same, or no packet matches both."""
    if first.action == second.action:
        return True
    families = _family(first.match), _family(second.match)
    if None not in families and families[0] != families[1]:
        return True
    protocols = [_protocol(rule) for rule in (first, second)]
    if None not in protocols and protocols[0] != protocols[1]:
        return True
    interfaces = [re.findall(_CONDITIONS["in"], rule.match) for rule in (first, second)]
    return all(interfaces) and interfaces[0] != interfaces[1]


def _protocol(rule: Rule) -> str | None:
    return next((name for name in ("tcp", "udp") if re.search(rf"\b{name}\b", rule.match)), None)


def _changes(rule: Rule) -> Iterator[Change]:
    yield "drop a rule", "rule", "", None
    for part, pattern in _CONDITIONS.items():
        for found in re.finditer(pattern, rule.match):
            yield from _of_condition(rule, part, found)
    zone = re.search(r"ct zone set (\d)", rule.action)
    if zone:
        wrong = rule.action.replace(zone.group(), f"ct zone set {3 - int(zone[1])}")
        yield "wrong zone", "zone", "", rule._replace(action=wrong)
    port = re.search(r"(?:redirect to |tproxy to | daddr):(\d+)", rule.action)
    if port:
        for number in shifted(port[1]):
            wrong = rule.action.replace(f":{port[1]}", f":{number}")
            yield "wrong port", "listener", "", rule._replace(action=wrong)
    mark = re.search(r"mark set (?:ct|meta) mark \| (0x\w+)", rule.action)
    if mark:
        wrong = rule.action.replace(mark[1], "0x4000")
        yield "wrong mark", "mark", "", rule._replace(action=wrong)


def _of_condition(rule: Rule, part: str, found: re.Match[str]) -> Iterator[Change]:
    text = found.group()

    def instead(new: str) -> Rule:
        match = " ".join((rule.match[: found.start()] + new + rule.match[found.end() :]).split())
        return rule._replace(match=match)

    if part != _NEEDED or not re.search("redirect to :| daddr:", rule.action):
        yield "drop a condition", part, "", instead("")
    if part in ("owner", "local", "local source", "source", "destination", "family"):
        yield "negate", part, "", instead(_negated(text))
    if part in ("in", "out"):
        yield "wrong interface", "interface", "", instead(re.sub('"[^"]*"', '"other9"', text))
    if part == "mark":
        head, _, bits = text.rpartition(" ")
        yield "wrong mark", part, "", instead(f"{head} {int(bits, 16) ^ 0x40000:#x}")
    number = re.search(r"(?<=[ ])(\d+)$", text)
    if part in ("port", "owner") and number:
        for wrong in shifted(number[1]):
            yield "off by one", part, "", instead(text[: number.start()] + wrong)
    if part in ("source", "destination") and "@" not in text:
        network = text.split()[-1]
        for more, value in off_by_one(network):
            host = ip_network(value)
            shown = str(host.network_address) if host.prefixlen == host.max_prefixlen else value
            yield "off by one", part, more, instead(text[: -len(network)] + shown)


def _negated(text: str) -> str:
    if "!= " in text:
        return text.replace("!= ", "")
    head, _, value = text.rpartition(" ")
    return f"{head} != {value}"


def _of_sets(table: Table) -> Iterator[tuple[str, Spot, str, Table]]:
    for place, item in enumerate(table.sets):
        for kind, spot, became, elements in _of_set(item):
            broken = item._replace(elements=elements)
            sets = (*table.sets[:place], broken, *table.sets[place + 1 :])
            yield kind, spot, became, table._replace(sets=sets)


def _of_set(item: Set) -> Iterator[tuple[str, Spot, str, tuple[str, ...]]]:
    for place, element in enumerate(item.elements):
        spot = Spot(f"set {item.name}", "element", _family(item.name), "", element)
        rest = item.elements[:place], item.elements[place + 1 :]
        if len(item.elements) > 1:
            yield "drop an element", spot, "nothing", (*rest[0], *rest[1])
        key, mark, value = element.partition(" : ")
        wrongs = off_by_one(key) if item.type.startswith("ipv") else (("", wrong) for wrong in shifted(key))
        for more, wrong in wrongs:
            host = "/" in wrong and wrong.endswith(("/32", "/128"))
            text = (wrong.partition("/")[0] if host else wrong) + mark + value
            yield "off by one", dataclasses.replace(spot, other=more), text, (*rest[0], text, *rest[1])


def _nft_only(policy: Policy, kind: str, spot: Spot, table: Table) -> str | None:
    """What only this engine's table holds twice."""
    if spot.chain == "tproxy_inbound" and {spot.rule, spot.other} & {"v3", "i2"} and not policy.inbound.insert:
        return "the nat chain before it has redirected them already"
    if spot.chain == "tproxy_last" and kind == "drop a condition" and spot.part == "local":
        return "what is for somebody else is asked in tproxy_first too"
    if spot.chain.endswith(("_first", "_last")):
        twin = spot.chain.replace("first", "LAST").replace("last", "first").replace("LAST", "last")
        texts = [rule.render(comments=False) for chain in table.chains if chain.name == twin for rule in chain.rules]
        if spot.text in texts and _is_made_up_for(policy, kind, spot):
            return "asked at both priorities: only rules of others in between could tell"
    if spot.rule == "g1" and kind in ("drop a rule", "swap two rules") and spot.text.endswith("reject with tcp reset"):
        return "the rule after it refuses everything, connections by an ICMP error"
    if spot.part == "family" and kind == "drop a condition":
        if re.search(r"ip6? [sd]addr", spot.text):
            return "the address says the family too"
        vnets = [vnet for vnet in policy.virtual_networks if f'"{vnet.interface.replace("+", "*")}"' in spot.text]
        if len({vnet.network.version for vnet in vnets}) > 1:
            return "the interface has a network of both families, with the same rule each"
    return None


def _is_made_up_for(policy: Policy, kind: str, spot: Spot) -> bool:
    """Whether the same rules at the other priority redirect what is missing at this one.

    They spare nothing that is redirected here.
    """
    if {spot.rule, spot.other} & {"l1", "e1", "g1"}:
        only_here = spot.chain == "prerouting_first" and policy.virtual_networks
        spares_more = kind == "drop a condition" or (kind == "negate" and _is_loopback_from_outside(spot))
        return spares_more and not only_here
    widened = kind == "wrong interface" and "!=" in spot.text
    return kind in ("drop a rule", "wrong interface", "swap two rules") and not widened


def _is_loopback_from_outside(spot: Spot) -> bool:
    """What only a raw socket could send."""
    return spot.rule == "l1" and spot.family is Family.IPV6 and spot.part == "destination"

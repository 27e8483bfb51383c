"""What a listing of iptables-save(8) says, as `foreign` data. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from tpctl.engines.foreign import Chain, Condition, Hook, Rule, Table, Verdict
from tpctl.engines.iptables import saved
from tpctl.engines.iptables.rule import FREE_TEXT, NAMES, split

_PRIORITIES = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}
"""linux/netfilter_ipv4.h; nat comes at 100 where sources are translated."""
_SOURCE_NAT = 100
_COUNTED = re.compile(r"\[(\d+):\d+\]")
_FIELDS = {
    "-s": "source", "-d": "destination", "-i": "in_interface", "-o": "out_interface", "-p": "protocol",
    "--dport": "destination_port", "--dports": "destination_port", "--sport": "source_port", "--sports": "source_port",
    "--ports": "port", "--ctstate": "state", "--state": "state", "--ctstatus": "status", "--ctdir": "direction",
    "--ctorigdstport": "original_port", "--ctorigdst": "original_destination", "--uid-owner": "uid",
    "--socket-exists": "owner", "--mark": "mark", "--dst-type": "destination_type", "--src-type": "source_type",
    "--src-range": "source", "--dst-range": "destination", "--icmp-type": "never", "--icmpv6-type": "never",
    "--syn": "syn", "--ctproto": "protocol",
}  # fmt: skip
_TARGETS = {
    "ACCEPT": Verdict.ACCEPT, "DROP": Verdict.DROP, "REJECT": Verdict.REJECT, "TARPIT": Verdict.REJECT,
    "STEAL": Verdict.DROP, "RETURN": Verdict.RETURN, "MARK": Verdict.MARK, "CONNMARK": Verdict.MARK,
    "REDIRECT": Verdict.TRANSLATE,
    "DNAT": Verdict.TRANSLATE, "TPROXY": Verdict.TRANSLATE, "NOTRACK": Verdict.UNTRACK,
    "MASQUERADE": Verdict.MASQUERADE, "SNAT": Verdict.MASQUERADE,
}  # fmt: skip
_SILENT = frozenset(
    {"comment", "tcp", "udp", "multiport", "conntrack", "state", "addrtype", "owner", "mark", "iprange"}
)
"""Matches (-m) that ask nothing but by the options above."""
_NOT_TRACKED = "-j CT --notrack"
_PRETEND_STATE = "dnat"
"""A state that conntrack's match adds for what was translated (iptables-extensions(8))."""


def tables_of(program: str, tables: Mapping[str, saved.SavedTable]) -> Iterator[Table]:
    """Those tables, listed by `program` ("iptables-nft")."""
    family = "ip6" if program.startswith("ip6") else "ip"
    for table in tables.values():
        rules: dict[str, list[saved.SavedRule]] = {}
        for found in table.rules:
            rules.setdefault(found.chain, []).append(found)
        chains = {name: _chain(table, name, policy, rules.get(name, [])) for name, policy in table.chains.items()}
        yield Table(program, family, table.name, chains)


def _chain(table: saved.SavedTable, name: str, policy: str, held: Iterable[saved.SavedRule]) -> Chain:
    rules = tuple(dataclasses.replace(rule(found.text), packets=found.packets) for found in held)
    hook = next((hook for hook in Hook if hook.upper() == name), None)
    if policy == "-" or hook is None:
        return Chain(name, rules)
    priority = _PRIORITIES.get(table.name, 0)
    if table.name == "nat" and hook in (Hook.INPUT, Hook.POSTROUTING):
        priority = _SOURCE_NAT
    kind = "nat" if table.name == "nat" else "filter"
    counted = _COUNTED.search(table.policies.get(name, ""))
    packets = int(counted[1]) if counted else 0
    return Chain(name, rules, hook, priority, _TARGETS.get(policy, Verdict.ACCEPT), kind, packets)


def rule(text: str) -> Rule:
    """A rule by what follows `-A CHAIN`."""
    conditions: list[Condition] = []
    verdict, target = Verdict.CONTINUE, ""
    for option, values, negated in _options(text):
        if option in ("-j", "-g"):
            target = values[0] if values else ""
            verdict = _TARGETS.get(target, Verdict.GOTO if option == "-g" else Verdict.JUMP)
            if target == "CT" and text.endswith(_NOT_TRACKED):
                verdict = Verdict.UNTRACK
            break  # what follows are the target's own options
        if option == "-m":
            conditions += [Condition(f"-m {name}") for name in values if name not in _SILENT]
        elif option != "--comment":
            conditions.append(_condition(option, values, negated))
    return Rule(text, tuple(conditions), verdict, target)


def _condition(option: str, values: list[str], negated: bool) -> Condition:
    field = _FIELDS.get(option, option)
    if option == "--tcp-flags":  # of a first packet, what is asked is nearly always: is it a SYN?
        return Condition("syn" if values[-1:] == ["SYN"] else option, negated=negated)
    words = tuple(part for value in values for part in value.split(","))
    if field == "state" and _PRETEND_STATE in {word.lower() for word in words}:
        if {word.lower() for word in words} == {_PRETEND_STATE}:
            return Condition("status", words, negated)
        return Condition("state_or_status", words, negated)
    return Condition(field, words, negated)


def _options(text: str) -> Iterator[tuple[str, list[str], bool]]:
    """Each option of a rule with its values, and whether `!` stood before it."""
    option, values, negated = "", list[str](), False
    next_negated = False
    for word, quoted in split(text):
        taken = bool(option) and not values and option in FREE_TEXT | NAMES
        if not quoted and not taken and word == "!":
            next_negated = True
        elif not quoted and not taken and word.startswith("-") and not word[1:2].isdigit():
            if option:
                yield option, values, negated
            option, values, negated, next_negated = word, [], next_negated, False
        else:
            values.append(word)
    if option:
        yield option, values, negated

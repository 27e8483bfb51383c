"""Rules of others that translate addresses in tables of nftables, as the rules of iptables that say the same. Pure.

So both can be judged in one way (`tpctl.engines.iptables.order`). Of a rule, what can be said so is: addresses, ports,
interfaces, owner, state, and whether the destination is this host. The rest is left out, which makes the rule match
more, as there where a criterion is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from tpctl.engines.iptables.rule import Criterion, Option, Rule, match
from tpctl.engines.iptables.saved import SavedRule, SavedTable
from tpctl.engines.nftables.listing import ListedChain, ListedTable

HOOKS = {"prerouting": "PREROUTING", "output": "OUTPUT"}
_VALUE = r'(?P<not>!= )?(?P<value>\{[^}]*\}|@\S+|"[^"]*"|\S+)'
_KEYS = (
    "ip saddr", "ip daddr", "ip6 saddr", "ip6 daddr", "tcp dport", "udp dport", "th dport", "tcp sport", "udp sport",
    "iifname", "iif", "oifname", "oif", "meta skuid", "ct state", "meta l4proto", "ip protocol", "ip6 nexthdr",
    "meta nfproto", "fib daddr type",
)  # fmt: skip
_CRITERION = re.compile(rf"(?<!\. )\b(?P<key>{'|'.join(_KEYS)}) (?!\.|vmap\b|map\b){_VALUE}(?! \.)")
_CALL = re.compile(r"(?:^| )(?P<verb>jump|goto) (?P<chain>[^ ,}]+)")
_VMAP = re.compile(r"(?P<key>\S+(?: \S+)*?(?: \. \S+(?: \S+)*?)*) vmap (?:\{(?P<inline>[^}]*)\}|@(?P<named>\S+))")
_ELEMENT = re.compile(r'([^,{}=]+?)(?: comment "[^"]*")? : (jump|goto) ([^ ,}]+)')
_TRANSLATION = re.compile(r"(?:^| )(?P<what>dnat|redirect)(?: (?:ip6? )?to (?P<to>\S+))?")
_TEXT = re.compile(r' comment "[^"]*"')
_MOST_ELEMENTS = 400


@dataclass(frozen=True, slots=True)
class Translations:
    """A base chain of somebody else's table that may translate, with what it calls."""

    where: str
    """Family, table and chain, as nft names them."""
    family: str
    hook: str
    """"PREROUTING" or "OUTPUT"."""
    priority: int
    table: SavedTable
    rules: tuple[str, ...]
    """Those of the base chain, as nft lists them; their places are those in `table`."""


def read(table: ListedTable) -> Iterator[Translations]:
    """The base chains of type nat in a table."""
    maps = {name: text for kind, name, text in table.others if kind == "map"}
    for base in table.chains:
        hook = HOOKS.get(base.hook or "")
        if base.kind != "nat" or hook is None or base.priority is None:
            continue
        called = {
            chain.name: chain for chain in table.chains if chain.hook is None and chain.name not in HOOKS.values()
        }
        chains = {hook: "ACCEPT", **dict.fromkeys(called, "-")}
        rules, texts = [], []
        for name, chain in {hook: base, **called}.items():
            for number, (rule, text) in enumerate(_rules_of(chain, maps), 1):
                rules.append(SavedRule(name, number, rule.render()))
                texts += [text] if name == hook else []
        saved = SavedTable("nat", chains, tuple(rules))
        where = f"{table.family} {table.name} {base.name}"
        yield Translations(where, table.family, hook, base.priority, saved, tuple(texts))


def _rules_of(chain: ListedChain, maps: Mapping[str, str]) -> Iterator[tuple[Rule, str]]:
    for text in chain.rules:
        bare = _TEXT.sub("", text)
        rule = _asked(Rule("LOG"), bare)
        if found := _TRANSLATION.search(bare):
            yield replace(rule, target=found["what"].upper(), target_options=_target(found["to"])), text
        elif found := _VMAP.search(bare):
            for each in islice(_elements(rule, found, maps), _MOST_ELEMENTS):
                yield each, text
        elif found := _CALL.search(bare):
            yield replace(rule, target=found["chain"], goto=found["verb"] == "goto"), text


def _elements(rule: Rule, vmap: re.Match[str], maps: Mapping[str, str]) -> Iterator[Rule]:
    """A rule for each element of a map that leads to a chain."""
    keys = [key.strip() for key in vmap["key"].split(" . ")]
    keys[0] = next((key for key in _KEYS if keys[0].endswith(key)), keys[0])
    content = vmap["inline"] if vmap["named"] is None else maps.get(vmap["named"], "").partition("elements =")[2]
    for parts, verb, chain in _ELEMENT.findall(content):
        values = [part.strip() for part in parts.split(" . ")]
        text = " ".join(f"{key} {value}" for key, value in zip(keys, values, strict=False))
        yield replace(_asked(rule, text), target=chain, goto=verb == "goto")


def _target(to: str | None) -> tuple[Option, ...]:
    return (Option("to-destination", (to,)),) if to and not to.startswith(":") else ()


def _asked(rule: Rule, text: str) -> Rule:
    for found in _CRITERION.finditer(text):
        rule = _with(rule, found["key"], _values(found["value"]), found["not"] is not None)
    return rule


def _values(value: str) -> list[str]:
    return [part.strip().strip('"') for part in value.strip("{} ").split(",")] if not value.startswith("@") else []


def _with(rule: Rule, key: str, values: list[str], negated: bool) -> Rule:
    """The rule with one more criterion; of several addresses or interfaces the first stands for all."""
    if not values:
        return rule
    first = values[0].replace("*", "+")
    kind, _, what = key.rpartition(" ")
    match what:
        case "saddr":
            return replace(rule, source=Criterion(first, negated))
        case "daddr":
            return replace(rule, destination=Criterion(first, negated))
        case "iifname" | "iif":
            return replace(rule, in_interface=Criterion(first, negated))
        case "oifname" | "oif":
            return replace(rule, out_interface=Criterion(first, negated))
        case "l4proto" | "protocol" | "nexthdr" if len(values) == 1 and not negated:
            return replace(rule, protocol=first)
        case "dport" | "sport":
            option = Option(f"{what}s", (",".join(value.replace("-", ":") for value in values),), negated)
            made = rule if kind == "th" else replace(rule, protocol=kind)
            return replace(made, matches=(*made.matches, match("multiport", option)))
        case "skuid":
            return replace(rule, matches=(*rule.matches, match("owner", Option("uid-owner", (first,), negated))))
        case "state":
            states = Option("ctstate", (",".join(values).upper(),), negated)
            return replace(rule, matches=(*rule.matches, match("conntrack", states)))
        case "type" if first == "local":
            return replace(rule, matches=(*rule.matches, match("addrtype", Option("dst-type", ("LOCAL",), negated))))
        case "nfproto" if not negated:
            return replace(rule, destination=rule.destination or Criterion("0.0.0.0/0" if first == "ipv4" else "::/0"))
    return rule

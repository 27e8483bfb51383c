"""After an uninstall: what must stay until the last connection through the data plane has ended.

When the last user of NAT in a network namespace goes, the kernel takes its NAT and conntrack hooks away, and packets of
connections that were redirected are no longer translated: they are reset. An empty nat chain keeps the NAT hooks, and a
rule that asks for `ct state` keeps conntrack; neither redirects anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from tpctl.engines.base import DIALLED_MARK
from tpctl.engines.nftables import tproxy
from tpctl.engines.nftables.nft import Objects
from tpctl.engines.nftables.parts import Parts
from tpctl.engines.nftables.table import FAMILY, NAME, TABLE, Chain, Hook, Rule, Set, Table
from tpctl.host import conntrack
from tpctl.spec.policy import Policy

PORTS = "draining_ports"
ANSWERS_TABLE = f"{FAMILY} {NAME}_answers"
_CHAIN = "draining"


def leftover(current: Objects | None, also: Iterable[int] = ()) -> str:
    """The transaction that leaves no redirect of ours, but keeps conntrack and NAT for connections that run.

    `also` are ports that another engine's rules redirect to.
    """
    ports = tuple(str(port) for port in sorted({*redirected_ports(current or []), *also}))
    rule = Rule("ct state established", "accept", "connections through the data plane may finish")
    table = Table(
        (Set(PORTS, "inet_service", ports),),
        (
            Chain(f"{_CHAIN}_nat", (), Hook("nat", "output", -99)),
            Chain(_CHAIN, (rule,), Hook("filter", "output", -1)),
        ),
    )
    # The kernel makes the new chains before it lets go of the old ones, so NAT always has a user.
    clearing = f"delete table {TABLE}\n" if current is not None else ""
    return clearing + table.render()


def answers_leftover(policy: Policy | None) -> str:
    """The transaction that makes a table of its own which brings applications' answers back as `tproxy` did.

    It also looks after what the data plane accepted under `policy` and has not dialled for yet: that is not redirected
    by the rules that come.
    """
    chains: tuple[Chain, ...]
    if policy is None:
        chains = (Chain(tproxy.ANSWERS, (tproxy.answer(),), Hook("route", "output", tproxy.MANGLE)),)
    else:
        parts = Parts(policy)
        kept = Chain("dialled", tuple(tproxy.undisturbed(parts)), Hook("nat", "output", tproxy.FIRST))
        chains = (*tproxy.output_chains(parts), kept)
    return Table((), chains, ANSWERS_TABLE).render()


def is_leftover(current: Objects) -> bool:
    """Whether a table is what `leftover` left."""
    return any(item.get("set", {}).get("name") == PORTS for item in current)


def redirected_ports(current: Objects) -> tuple[int, ...]:
    """The data plane's ports that a table redirects, or did before it became a leftover."""
    found: set[int] = set()
    for item in current:
        for part in item.get("rule", {}).get("expr", ()):
            for action in (part.get("redirect"), part.get("dnat")):
                if action and isinstance(action.get("port"), int):
                    found.add(action["port"])
        if item.get("set", {}).get("name") == PORTS:
            found |= {port for element in item["set"].get("elem", ()) for port in _ports(element)}
    return tuple(sorted(found))


def _ports(element: object) -> Iterable[int]:
    if isinstance(element, int):
        return (element,)
    if isinstance(element, dict) and "range" in element:
        first, last = element["range"]
        return range(first, last + 1)
    return ()


def running(ports: Iterable[int]) -> int:
    """How many TCP connections of this network namespace are redirected to one of `ports` and have not ended.

    0 as well when the kernel cannot be asked.
    """
    wanted = frozenset(ports)
    if not wanted:
        return 0
    return sum(
        1
        for entry in conntrack.entries()
        if entry.reply.source_port in wanted and entry.is_running and entry.is_redirected
    )


def dialled() -> int:
    """How many TCP connections the data plane has dialled from its clients' addresses, and have not ended.

    0 as well when the kernel cannot be asked.
    """
    return sum(1 for entry in conntrack.entries() if entry.mark & DIALLED_MARK and entry.is_running)

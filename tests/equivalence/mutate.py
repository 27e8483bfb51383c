"""`python -m tests.equivalence.mutate`: how many deliberately broken engines the suite finds out. Needs root.

A plan with one mistake in it is applied; the policy's own probes and the connections of every state then have to
disagree with `decide()` somewhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.equivalence import mutations_iptables, mutations_nftables
from tests.equivalence.connections import stateful_connections
from tests.equivalence.engines import DOORS, Door
from tests.equivalence.harness import Bench
from tests.equivalence.mutant import Mutant, spread
from tests.equivalence.mutation_policies import POLICIES
from tpctl.spec.policy import Policy
from tpctl.system.errors import TpctlError

REQUIRED = 0.95
_SOUND_TRIES = 20
"""On a busy machine something may come late once, but not every time."""
_MAKERS: dict[str, Any] = {
    "nftables": mutations_nftables.mutants,
    "iptables-nft": mutations_iptables.mutants,
    "iptables-legacy": mutations_iptables.mutants,
    "iptables-legacy-restore": mutations_iptables.mutants,
}


@dataclass(slots=True)
class Tally:
    """What came of an engine's mutants."""

    tried: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    unseen: Counter[str] = field(default_factory=Counter)
    """By the reason why they change nothing that can be seen."""
    refused: int = 0
    """The kernel would not take them."""
    survivors: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The caught ones of those tried."""
        return self.caught.total() / max(1, self.tried.total())


def mutants_of(door: Door, bench: Bench) -> list[tuple[Policy, Mutant]]:
    """Every mutation of every policy's plan."""
    found = []
    for policy in POLICIES:
        staging = bench.stage(policy)
        plan = bench.plan(staging.policy, staging.layout)
        found += [(staging.policy, mutant) for mutant in _MAKERS[door.name](plan, staging.policy)]
    return found


def challenge(door: Door, most: int, show: bool = False) -> Tally:
    """Try at most so many mutants of an engine that must be found out, when it is not found out without a mistake.

    Raises AssertionError when it is: then every mutant would seem to be caught.
    """
    tally = Tally()
    with Bench(door) as bench:
        for policy in POLICIES:
            _expect_no_surprise(bench, policy)
        everything = mutants_of(door, bench)
        for _, mutant in everything:
            if mutant.unseen:
                tally.unseen[mutant.unseen] += 1
                if show:
                    print(f"unseen: {mutant}: {mutant.unseen}")
        for policy, mutant in _chosen(everything, most):
            _try(bench, policy, mutant, tally)
    return tally


def audit(door: Door, most: int) -> Tally:
    """Try at most so many of the mutants that nothing should show; the reason of one that is caught does not hold."""
    tally = Tally()
    with Bench(door) as bench:
        excused = [(policy, mutant) for policy, mutant in mutants_of(door, bench) if mutant.unseen]
        for policy, mutant in spread(sorted(excused, key=lambda each: str(each[1].unseen)), most):
            before = tally.caught.total()
            _try(bench, policy, mutant, tally)
            if tally.caught.total() > before:
                print(f"caught: {mutant}, although {mutant.unseen}", flush=True)
    tally.survivors.clear()
    return tally


def _expect_no_surprise(bench: Bench, policy: Policy) -> None:
    for _ in range(_SOUND_TRIES):
        wrong = bench.compare(policy, stateful_connections, first_only=True)
        if not wrong:
            return
    raise AssertionError(f"{bench.door.name}: found out without a mistake: {wrong[0]}")


def _chosen(everything: list[tuple[Policy, Mutant]], most: int) -> Iterator[tuple[Policy, Mutant]]:
    """Spread over policies, rules and kinds; the neighbours of a mutant are most like it."""
    owners = {id(mutant): policy for policy, mutant in everything}
    visible = sorted((mutant for _, mutant in everything if not mutant.unseen), key=lambda mutant: mutant.kind)
    for mutant in spread(visible, most):
        yield owners[id(mutant)], mutant


def _try(bench: Bench, policy: Policy, mutant: Mutant, tally: Tally) -> None:
    try:
        wrong = bench.compare(policy, stateful_connections, lambda *_: mutant.plan, first_only=True)
    except TpctlError:
        tally.refused += 1
        return
    tally.tried[mutant.kind] += 1
    if wrong:
        tally.caught[mutant.kind] += 1
    else:
        number = [bench.stage(each).policy for each in POLICIES].index(policy)
        tally.survivors.append(f"policy {number}: {mutant}")


def report(name: str, tally: Tally, seconds: float) -> Iterator[str]:
    """The tally as lines."""
    total = f"{tally.caught.total()}/{tally.tried.total()} caught ({tally.share:.1%})"
    yield f"{name}: {total}, {seconds:.0f} s"
    for kind, tried in sorted(tally.tried.items()):
        yield f"    {kind:<18} {tally.caught[kind]:>4}/{tried}"
    if tally.refused:
        yield f"    {tally.refused} more were refused by the kernel"
    if tally.unseen:
        yield f"    {tally.unseen.total()} more were not tried, because nothing could show them:"
    for reason, count in tally.unseen.most_common():
        yield f"      {count:>4} {reason}"
    for survivor in tally.survivors:
        yield f"    not caught: {survivor}"


def main() -> int:
    """Run it; 1 when an engine's broken versions are not found out often enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mutants", type=int, nargs="?", default=400, help="at most so many for each engine")
    parser.add_argument("--engine", action="append", choices=sorted(_MAKERS), help="only this engine; may be repeated")
    parser.add_argument("--show", action="store_true", help="name the mutants that nothing could show")
    parser.add_argument("--excused", action="store_true", help="try those instead: none of them may be caught")
    arguments = parser.parse_args()
    good = True
    for name in arguments.engine or _MAKERS:
        began = time.monotonic()
        if arguments.excused:
            tally = audit(DOORS[name], arguments.mutants)
        else:
            tally = challenge(DOORS[name], arguments.mutants, arguments.show)
        print("\n".join(report(name, tally, time.monotonic() - began)), flush=True)
        good = good and (not tally.caught.total() if arguments.excused else tally.share >= REQUIRED)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

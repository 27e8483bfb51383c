"""`make bench-swap`: connections that leak or fail while policies and engines are swapped under load.

Four processes on a host and its peer (IPv4 and IPv6, outbound and inbound) open one connection after the other; each
connection is answered by the data plane, by the real server (leaked) or by nobody (failed). Connections in both
directions that ran before the swaps, some of them before the first install, are asked after each swap whether they go
on (cut if not). Everything happens in namespaces of its own. The exit code is 0 only if nothing leaked, failed or was
cut.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator

import tpctl
from tests.swap.scene import scene
from tests.swap.swaps import (
    ENGINES,
    KUMACTL,
    NFTABLES,
    POLICIES,
    Outcome,
    Target,
    between,
    inside,
    name,
    roll_back_to_kumactl,
    swap,
    swap_kumactl,
)
from tpctl.spec.engine_options import EngineOptions

SWAPS = 200
ROLLBACKS = 20
"""From each engine to kumactl's rules, at most: most of the time of each goes by before and after it."""
CONNECTIONS = 50_000
"""Over which the numbers are to hold; more swaps than asked for are made until there were as many, within limits."""
LONGEST_SECONDS = 60.0
"""For one kind of swap."""

Row = tuple[str, Outcome]


def swaps_inside(options: EngineOptions, times: int) -> Iterator[Row]:
    """Policies are swapped in one engine."""
    label = f"inside {name(options)}"
    with scene() as made:
        for _, _, outcome in swap(made, Target(POLICIES[0], options), inside(options, times)):
            yield label, outcome


def swaps_between(times: int) -> Iterator[Row]:
    """Engines are swapped, each for each."""
    label = ""
    with scene() as made:
        for before, after, outcome in swap(made, Target(POLICIES[0], NFTABLES), between(times)):
            # What was seen after the last swap counts to the last swap.
            label = f"{name(before.options)} -> {name(after.options)}" if outcome.swaps else label
            yield label, outcome


def swaps_from_kumactl(options: EngineOptions, times: int) -> Iterator[Row]:
    """kumactl's rules are replaced; between the swaps everything stands still while they are put back."""
    with scene() as made:
        applications = made.applications()
        starts = itertools.islice(itertools.cycle(KUMACTL), times)
        for number, (variant, full) in enumerate(starts):
            policy = POLICIES[number // len(KUMACTL) % len(POLICIES)]
            label = f"kumactl ({variant}) -> {name(options)}"
            yield label, swap_kumactl(made, applications, variant, full, Target.of(policy, options))
        rest = Outcome()
        rest.tally.reasons = applications.stop().reasons
        yield label, rest


def rollbacks_to_kumactl(options: EngineOptions, times: int) -> Iterator[Row]:
    """Installs over kumactl's rules are rolled back; between the rollbacks everything stands still."""
    with scene() as made:
        applications = made.applications()
        starts = itertools.islice(itertools.cycle(KUMACTL), times)
        for number, (variant, full) in enumerate(starts):
            target = Target.of(POLICIES[number // len(KUMACTL) % len(POLICIES)], options)
            label = f"{name(options)} rolled back to kumactl ({variant})"
            yield label, roll_back_to_kumactl(made, applications, variant, full, target)
        rest = Outcome()
        rest.tally.reasons = applications.stop().reasons
        yield label, rest


def kinds(times: int) -> Iterator[Callable[[], Iterator[Row]]]:
    """Every kind of swap, `times` swaps each."""
    for options in ENGINES:
        yield lambda options=options: swaps_inside(options, times)  # type: ignore[misc]
    yield lambda: swaps_between(times)
    for options in ENGINES:
        yield lambda options=options: swaps_from_kumactl(options, max(len(KUMACTL), times // len(ENGINES)))  # type: ignore[misc]
    for options in ENGINES:
        yield lambda options=options: rollbacks_to_kumactl(options, min(times, ROLLBACKS))  # type: ignore[misc]


def measure(kind: Callable[[], Iterator[Row]]) -> dict[str, Outcome]:
    """The outcomes of one kind, by label."""
    totals: dict[str, Outcome] = {}
    for label, outcome in kind():
        total = totals.setdefault(label, Outcome())
        total.swaps += outcome.swaps
        total.seconds += outcome.seconds
        total.tally += outcome.tally
        total.cut += outcome.cut
    return totals


def row(label: str, total: Outcome) -> str:
    """One line of the table."""
    tally = total.tally
    each = 1000 * total.seconds / max(total.swaps, 1)
    return (
        f"{label:<44}{total.swaps:>7}{each:>9.0f}{tally.connections:>13}{tally.leaked:>8}{tally.failed:>8}"
        f"{len(total.cut):>5}{1000 * tally.slowest:>13.0f}"
    )


def report(times: int) -> bool:
    """Make the swaps and print the table; hands back whether all of them were flawless."""
    columns = f"{'swap':<44}{'swaps':>7}{'ms each':>9}{'connections':>13}"
    print(f"{columns}{'leaked':>8}{'failed':>8}{'cut':>5}{'slowest ms':>13}")
    everything = Outcome()
    for kind in kinds(times):
        for label, total in measure(kind).items():
            print(row(label, total), flush=True)
            everything.swaps += total.swaps
            everything.seconds += total.seconds
            everything.tally += total.tally
            everything.cut += total.cut
    print(row("all", everything))
    for reason, count in everything.tally.reasons.most_common(20):
        print(f"  {count} times: {reason}")
    for complaint in everything.cut[:20]:
        print(f"  cut: {complaint}")
    tally = everything.tally
    return not (tally.leaked or tally.failed or everything.cut)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--swaps", type=int, default=SWAPS, help="swaps of each kind (default: %(default)s)")
    times = parser.parse_args().swaps
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    print(f"tpctl {tpctl.__version__}, Python {platform.python_version()}, Linux {platform.release()}")
    started = time.monotonic()
    flawless = report(times)
    print(f"{'nothing leaked, failed or was cut' if flawless else 'NOT flawless'}; {time.monotonic() - started:.0f} s")
    return 0 if flawless else 1


if __name__ == "__main__":
    sys.exit(main())

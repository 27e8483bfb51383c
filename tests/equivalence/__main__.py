"""`python -m tests.equivalence N`: every engine against `decide()` on N random policies. Needs root."""

from __future__ import annotations

import argparse
import sys
import time

from tests.equivalence.engines import DOORS
from tests.equivalence.run import any_seed, drawn, run


def main() -> int:
    """Run it; 1 when an engine disagrees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policies", type=int, nargs="?", default=200, help="how many policies")
    parser.add_argument("--engine", action="append", choices=sorted(DOORS), help="only this engine; may be repeated")
    parser.add_argument("--seed", type=int, default=None, help="the number that an earlier run printed")
    arguments = parser.parse_args()
    start = any_seed() if arguments.seed is None else arguments.seed
    wanted = drawn(arguments.policies, start)
    print(f"{len(wanted)} policies, --seed {start}")
    print(f"{'engine':<16} {'policies':>8} {'connections':>11} {'disagreements':>13} {'seconds':>8}", flush=True)
    failed = []
    for name in arguments.engine or DOORS:
        began = time.monotonic()
        outcome = run(DOORS[name], wanted, lambda line: print(line, file=sys.stderr, flush=True))
        score, seconds = outcome.score, time.monotonic() - began
        print(
            f"{name:<16} {len(wanted):>8} {score.connections:>11} {len(outcome.wrong):>13} {seconds:>8.1f}", flush=True
        )
        if score.doubts:
            print(f"{'':<16} {score.doubts} connections were tried twice: wrong at first, right the second time")
        if outcome.smallest:
            failed.append(f"{name}: {outcome.smallest}")
    for text in failed:
        print(f"\n{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

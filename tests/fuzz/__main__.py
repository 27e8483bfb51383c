"""`python -m tests.fuzz [COUNT [SEED [TARGET...]]]`: so many random inputs for each parser, a million by default.

With names of targets, for these alone.
"""

from __future__ import annotations

import sys
import time

from tests.fuzz import host, relay, relay_dns

TARGETS = (*host.TARGETS, *relay.TARGETS, *relay_dns.TARGETS)


def main() -> None:
    """Run the targets; the seed is printed, so that a run can be repeated."""
    count, seed, *names = [*sys.argv[1:], *("1000000", str(int(time.time())))[len(sys.argv[1:]) :]]
    if unknown := set(names) - {target.name for target in TARGETS}:
        sys.exit(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(target.name for target in TARGETS)}")
    print(f"seed {seed}", flush=True)
    for target in TARGETS:
        if not names or target.name in names:
            print(relay.run(target, int(count), int(seed)), flush=True)


if __name__ == "__main__":
    main()

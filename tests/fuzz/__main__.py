"""`python -m tests.fuzz [COUNT [SEED]]`: so many random inputs for each parser (a million by default)."""

from __future__ import annotations

import sys
import time

from tests.fuzz import host, relay, relay_dns


def main() -> None:
    """Run every target; the seed is printed, so that a run can be repeated."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    print(f"seed {seed}")
    for target in (*host.TARGETS, *relay.TARGETS, *relay_dns.TARGETS):
        print(relay.run(target, count, seed), flush=True)


if __name__ == "__main__":
    main()

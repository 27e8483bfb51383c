"""`python -m tests.userspace.way`: by what legacy rules are written here, whatever the policy."""

from __future__ import annotations

from tests.equivalence.mutation_policies import POLICIES
from tpctl.engines.iptables.engine import select
from tpctl.spec.engine_options import EngineOptions


def main() -> None:
    """Print it."""
    engine = select(EngineOptions(engine="iptables", iptables_mode="legacy"))
    # The kernel refuses the rules of a control group that is not there, whoever gives them to it.
    ways = {engine.way(engine.plan(policy)) or "" for policy in POLICIES if not policy.cgroup}
    print(" / ".join(sorted({way.partition(",")[0] for way in ways})))


if __name__ == "__main__":
    main()

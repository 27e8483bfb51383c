"""`make bench-scale`, second part: what grows with the host, at N and at 2N, each time in a namespace of its own.

Seconds of wall clock and of CPU time, this process's and its children's: on a busy machine only the latter tell
anything. Twice as many of something should take twice as long, or less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from tests.netns.lab import bare_namespace
from tpctl.change import lifecycle
from tpctl.relay.figures.reckoning import Figures, view
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Outbound, Policy, PortRange, Protocol, UidExclusion, UidRange

PROXY = 65534
ENGINES = {
    "nftables": EngineOptions(engine="nftables"),
    "iptables-nft": EngineOptions(engine="iptables", iptables_mode="nft"),
    "iptables-legacy": EngineOptions(engine="iptables", iptables_mode="legacy"),
}


def excluded_users(count: int, engine: str) -> Callable[[], object]:
    """An install with that many excluded users, each with a port of its own."""
    users = tuple(
        UidExclusion(Protocol.TCP, (PortRange(1 + number),), UidRange(10000 + 2 * number)) for number in range(count)
    )
    return lambda: lifecycle.install(Policy(PROXY, outbound=Outbound(exclude_uids=users)), ENGINES[engine])


def foreign_rules(count: int, engine: str) -> Callable[[], object]:
    """An install beside that many rules of somebody else's."""
    rules = "".join(f"-A F -p tcp -m tcp --dport {1 + number % 60000} -j RETURN\n" for number in range(count))
    program = "iptables-legacy-restore" if engine == "iptables-legacy" else "iptables-nft-restore"
    text = f"*nat\n:F - [0:0]\n{rules}COMMIT\n"
    subprocess.run([program, "--noflush"], input=text, text=True, check=True)
    return lambda: lifecycle.install(Policy(PROXY), ENGINES[engine])


def routes(count: int, engine: str) -> Callable[[], object]:
    """An install and a status with that many routes."""
    batch = "".join(
        f"route add blackhole 10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32\n" for number in range(count)
    )
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)

    def work() -> None:
        lifecycle.install(Policy(PROXY), ENGINES[engine])
        lifecycle.apply()

    return work


def listeners(count: int, _: str) -> Callable[[], object]:
    """A picture of `tpctl top` for a relay with that many listeners."""
    lines = ["tpctl_relay_workers 1"]
    for number in range(count):
        lines.append(f'tpctl_relay_listener_info{{listener="l{number}"}} 1')
        lines += [
            f'tpctl_relay_connections_ended_total{{listener="l{number}",reason="{reason}"}} 1' for reason in "abcd"
        ]
    text = "\n".join(lines)

    def work() -> None:
        figures = Figures(text)
        view(figures, figures, 1.0)

    return work


ROWS = (
    ("excluded users", excluded_users, 4000, tuple(ENGINES)),
    ("foreign rules", foreign_rules, 10000, tuple(ENGINES)),
    ("routes", routes, 50000, ("nftables",)),
    ("listeners in top", listeners, 4000, ("",)),
)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """How long it takes: by the clock, and of CPU time."""
    before, began = os.times(), time.perf_counter()
    work()
    after, ended = os.times(), time.perf_counter()
    return ended - began, sum(after[:4]) - sum(before[:4])


def main() -> int:
    """Run it."""
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    print(f"{'what':<20}{'engine':<18}{'N':>8}{'s':>8}{'CPU s':>8}{'2N: s':>8}{'CPU s':>8}")
    for what, prepare, count, engines in ROWS:
        for engine in engines:
            measured: list[float] = []
            for number in (count, 2 * count):
                with bare_namespace() as space, space.inside():
                    measured += seconds(prepare(number, engine))
            print(f"{what:<20}{engine:<18}{count:>8}" + "".join(f"{one:>8.2f}" for one in measured), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What is swapped for what, and what the applications saw of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network

from tests.swap.scene import REMOTES, Scene, inbound, outbound
from tests.swap.traffic import APP, FAMILIES, PROXY, REAL, REAL_PORT, Applications, Kept, Tally
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import (
    ALL_PORTS,
    Dns,
    DnsCapture,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

NFTABLES = EngineOptions(engine="nftables")
IPTABLES_NFT = EngineOptions(engine="iptables", iptables_mode="nft")
IPTABLES_LEGACY = EngineOptions(engine="iptables", iptables_mode="legacy")
EBPF = EngineOptions(engine="ebpf")
ENGINES = (NFTABLES, IPTABLES_NFT, IPTABLES_LEGACY, EBPF)
_EACH_AFTER_EACH = (
    IPTABLES_NFT, NFTABLES, IPTABLES_LEGACY, NFTABLES, EBPF, IPTABLES_NFT,
    IPTABLES_LEGACY, IPTABLES_NFT, EBPF, IPTABLES_LEGACY, EBPF, NFTABLES,
)  # fmt: skip
"""For a start with nftables."""

NEVER_SECONDS = 3600.0
"""Until a change is taken back by itself: a rollback comes before."""
AT_LEAST = 20
"""So many connections come with each swap; on an idle machine there are a hundred times as many."""

KUMACTL = tuple((variant, full) for variant in ("nft", "legacy") for full in (False, True))
"""The variants and kinds of a kumactl installation."""

_EXCLUDED_PORTS = tuple(PortRange(port, port + 3) for port in range(20000, 20240, 8))
_EXCLUDED_NETWORKS = tuple(ip_network(f"10.0.{number}.0/24") for number in range(0, 30, 2))
POLICIES = (
    Policy(PROXY),
    Policy(
        PROXY,
        inbound=Inbound(exclude_ports=(PortRange(22),), exclude_sources=_EXCLUDED_NETWORKS),
        outbound=Outbound(exclude_ports=_EXCLUDED_PORTS, exclude_destinations=_EXCLUDED_NETWORKS),
        dns=Dns(DnsCapture.ALL, tcp=True),
        virtual_networks=(VirtualNetwork("br+", ip_network("172.30.0.0/16")),),
        drop_invalid=True,
    ),
    Policy(
        PROXY,
        inbound=Inbound(insert=True),
        outbound=Outbound(insert=True),
        dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("192.0.2.53")), NameServer(ip_address("2001::53")))),
    ),
    Policy(
        PROXY,
        inbound=Inbound(include_ports=(PortRange(80, 90), PortRange(REAL_PORT))),
        outbound=Outbound(include_ports=(PortRange(443), PortRange(8000, 8100))),
    ),
)
"""Each captures what the applications open; little else do they have in common."""

EXCLUDING = (
    Policy(PROXY, outbound=Outbound(exclude_ports=(PortRange(22), PortRange(8000, 8100)))),
    Policy(PROXY, outbound=Outbound(exclude_destinations=tuple(map(ip_network, REMOTES.values())))),
    Policy(PROXY, outbound=Outbound(exclude_uids=(UidExclusion(Protocol.TCP, (ALL_PORTS,), UidRange(APP)),))),
    Policy(
        PROXY,
        outbound=Outbound(
            exclude_uids=(
                UidExclusion(Protocol.TCP, (PortRange(REAL_PORT),), UidRange(APP, APP + 100)),
                UidExclusion(Protocol.TCP, (PortRange(25),), UidRange(2000)),
            )
        ),
    ),
)
"""Each leaves alone what the applications of the host open, for a reason of its own."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is installed next."""

    policy: Policy
    options: EngineOptions

    @classmethod
    def of(cls, policy: Policy, options: EngineOptions) -> Target:
        """As much of a policy as an engine can do: eBPF knows no virtual networks, and nothing of invalid packets."""
        if options.engine == "ebpf":
            policy = replace(policy, virtual_networks=(), drop_invalid=False)
        return cls(policy, options)


@dataclass(slots=True)
class Outcome:
    """What a number of swaps did."""

    swaps: int = 0
    seconds: float = 0.0
    """What the swaps took, added up."""
    tally: Tally = field(default_factory=Tally)
    cut: list[str] = field(default_factory=list)
    """Connections that ran before a swap and did not go on after it."""

    def add(self, seconds: float, tally: Tally, cut: Iterable[str]) -> None:
        """One more swap."""
        self.swaps += 1
        self.seconds += seconds
        self.tally += tally
        self.cut += cut


def name(options: EngineOptions) -> str:
    """An engine as people call it."""
    return f"iptables {options.iptables_mode}" if options.engine == "iptables" else options.engine


def inside(options: EngineOptions, times: int, policies: Sequence[Policy] = POLICIES) -> list[Target]:
    """Policies in turn, in one engine. For a start with the first policy."""
    return [Target.of(policies[turn % len(policies)], options) for turn in range(1, times + 1)]


def between(times: int, policies: Sequence[Policy] = POLICIES) -> list[Target]:
    """Engines in turn, so that each follows each; policies in turn as well. For a start with nftables."""
    order = _EACH_AFTER_EACH
    return [Target.of(policies[turn // 2 % len(policies)], order[turn % len(order)]) for turn in range(times)]


def timed_install(made: Scene, target: Target) -> float:
    """Install; hands back the seconds it took."""
    started = time.monotonic()
    report = made.install(target.policy, target.options)
    assert report.changed, "exactly this was installed already: nothing was swapped"
    return time.monotonic() - started


def keep(made: Scene, *, direct: bool) -> list[Kept]:
    """Connections in both directions that are held open: those of the real servers, or of the data plane."""
    expected = {"expected": REAL} if direct else {}
    return [
        Kept(made.host, APP, [outbound(family, **expected) for family in FAMILIES for _ in range(3)]),
        Kept(made.peer, 0, [inbound(family, **expected) for family in FAMILIES for _ in range(3)]),
    ]


def broken(kept: Iterable[Kept]) -> list[str]:
    """What has become of them, when it is bad."""
    return [complaint for group in kept for complaint in group.broken()]


def swap(made: Scene, first: Target, targets: Iterable[Target]) -> Iterator[tuple[Target, Target, Outcome]]:
    """Install `first` on an untouched host, then replace it by each target while applications run.

    Yields what was replaced, by what, and the outcome of that one swap; the last outcome also holds what the
    applications saw afterwards, and the reasons of everything that went wrong.
    """
    kept = keep(made, direct=True)
    made.install(first.policy, first.options)
    early = broken(kept)
    kept += keep(made, direct=False)
    applications = made.applications()
    applications.resume()
    previous, seen = first, Tally()
    for target in targets:
        outcome = Outcome()
        seconds = timed_install(made, target)
        now = applications.at_least(seen.connections + AT_LEAST)
        outcome.add(seconds, now - seen, [*early, *broken(kept)])
        yield previous, target, outcome
        previous, seen, early = target, now, []
    end = applications.stop()
    rest = end - seen
    rest.reasons = end.reasons
    yield previous, previous, Outcome(0, 0.0, rest, broken(kept))
    for group in kept:
        group.close()


def swap_kumactl(made: Scene, applications: Applications, variant: str, full: bool, target: Target) -> Outcome:
    """Install over what kumactl left, while applications run; connections that go through its redirects go on."""
    made.install_kumactl(variant, full=full)
    kept = keep(made, direct=False)
    before = applications.tally()
    applications.resume()
    applications.at_least(before.connections + AT_LEAST // 2)  # some connections are made by kumactl's rules
    seconds = timed_install(made, target)
    applications.at_least(before.connections + AT_LEAST)
    outcome = Outcome()
    cut = broken(kept)
    applications.pause()
    outcome.add(seconds, applications.tally() - before, cut)
    for group in kept:
        group.close()
    return outcome


def roll_back_to_kumactl(made: Scene, applications: Applications, variant: str, full: bool, target: Target) -> Outcome:
    """The way back of an install over what kumactl left, while applications run.

    Connections of before (for `full` ones: else conntrack may be idle meanwhile) and after the install go on.
    """
    made.install_kumactl(variant, full=full)
    kept = keep(made, direct=False) if full else []
    made.install(target.policy, target.options, NEVER_SECONDS)
    return _rolled_back(made, applications, [*kept, *keep(made, direct=False)])


def roll_back_to(made: Scene, applications: Applications, first: Target, target: Target) -> Outcome:
    """The way back of an install over another one of tpctl's, while applications run."""
    made.install(first.policy, first.options)
    kept = keep(made, direct=False)
    made.install(target.policy, target.options, NEVER_SECONDS)
    return _rolled_back(made, applications, [*kept, *keep(made, direct=False)])


def _rolled_back(made: Scene, applications: Applications, kept: Sequence[Kept]) -> Outcome:
    before = applications.tally()
    applications.resume()
    applications.at_least(before.connections + AT_LEAST // 2)  # some connections are made by the rules that go
    started = time.monotonic()
    done = made.roll_back()
    seconds = time.monotonic() - started
    assert done, "there was nothing to roll back"
    applications.at_least(before.connections + AT_LEAST)
    cut = broken(kept)
    applications.pause()
    outcome = Outcome()
    outcome.add(seconds, applications.tally() - before, cut)
    for group in kept:
        group.close()
    return outcome

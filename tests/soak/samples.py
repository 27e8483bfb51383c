"""What is measured again and again in a long run, and whether it has grown. `judge` is pure."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.netns.lab import run
from tests.soak.plant import Plant
from tpctl.bpf import syscall
from tpctl.engines.ebpf import installed
from tpctl.engines.nftables.drain import PORTS
from tpctl.rehearsal.layout import HOST

Sample = Mapping[str, int]

TOLERANCES: Mapping[str, tuple[float, int]] = {
    "relay: memory, KB": (0.05, 1024),
    "relay: descriptors": (0.1, 10),
    "relay: pipes": (0.1, 8),
    "conntrack entries": (0.5, 300),
    "eBPF map entries": (0.0, 100),
    "rules and sets": (0.0, 0),
    "files below /run/tpctl": (0.0, 0),
    "pins in bpffs": (0.0, 0),
    "processes": (0.0, 1),
}
"""By which part, and by how much, the median may be larger in the end. Descriptors, conntrack and map entries follow
the traffic of the moment, memory the allocator's; the rest is what one policy needs under one engine, and no more."""
WARM_UP = 0.1
"""The part of the samples, from the first, that is not judged."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that was measured."""

    name: str
    first: float
    """The median of the first third."""
    last: float
    highest: int
    allowed: float
    """What the median of the last third may be."""

    @property
    def grows(self) -> bool:
        """Whether it is more than that."""
        return self.last > self.allowed

    def __str__(self) -> str:
        word = "GROWS" if self.grows else "steady"
        return f"{self.name:<34}{self.first:>10.0f}{self.last:>10.0f}{self.highest:>10}{self.allowed:>10.0f}  {word}"


HEADING = f"{'':<34}{'first':>10}{'last':>10}{'highest':>10}{'allowed':>10}"


def judge(samples: Sequence[Sample]) -> list[Verdict]:
    """Compare the medians of the first and of the last third, after a warm-up. Empty for too few samples."""
    kept = samples[int(len(samples) * WARM_UP) :]
    third = len(kept) // 3
    if not third:
        return []
    found = []
    for name in dict.fromkeys(name for sample in kept for name in sample):
        values = [sample[name] for sample in kept if name in sample]
        third = max(len(values) // 3, 1)
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        part, amount = next((tolerance for kind, tolerance in TOLERANCES.items() if name.startswith(kind)), (0.0, 0))
        found.append(Verdict(name, first, last, max(values), first * (1 + part) + amount))
    return found


def take(plant: Plant) -> Sample:
    """One sample. What depends on the policy and the engine is named after them."""
    kinds = _descriptors(plant.relay.pid)
    under = f", {plant.engine} {plant.policy}"
    sample = {
        "relay: memory, KB": _resident(plant.relay.pid),
        "relay: descriptors": sum(kinds.values()),
        "relay: pipes": kinds.get("pipe", 0),
        f"rules and sets{under}": _rules(plant),
        "files below /run/tpctl": len(plant.host.files("/run/tpctl")),
        f"pins in bpffs{under}": sum(path.is_file() for path in plant.place.pins.rglob("*")),
        "processes": len((plant.place.cgroup / "cgroup.procs").read_text().split()),
    }
    with plant.lab.inside(HOST):
        sample["conntrack entries"] = int(run(["conntrack", "-C"]).stdout)
    if plant.engine == "ebpf":
        sample[f"eBPF map entries{under}"] = _entries(plant.place.pins)
    return sample


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _descriptors(pid: int) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            kind = str(link.readlink()).partition(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _rules(plant: Plant) -> int:
    """Lines of every listing, less tables of others, and what stays until connections have ended."""
    with plant.lab.inside(HOST):
        tools = ("iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save")
        text = "".join(run([tool]).stdout for tool in tools)
        tables = run(["nft", "list", "tables"]).stdout.splitlines()
        own = run(["nft", "list", "table", "inet", "tpctl"]).stdout if "table inet tpctl" in tables else ""
    saved = [line for line in text.splitlines() if line.startswith("-A") or "TPCTL" in line]
    return len(saved) + (0 if PORTS in own else len(own.splitlines()))


def _entries(pins: Path) -> int:
    """Entries of the maps that the programs share, those of arrays too; socket storage goes with its sockets."""
    total = 0
    for folder in {path.parent for path in pins.rglob("*") if path.is_file()}:
        with installed.opened(folder) as found:
            for descriptor in found.maps.values():
                with contextlib.suppress(OSError):
                    total += sum(1 for _ in syscall.keys(descriptor, syscall.map_info(descriptor).shape.key_size))
    return total

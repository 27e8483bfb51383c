"""Many commands at the same time, in one network namespace, beside a program that knows nothing of tpctl."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.scene import FLAVOURS, PROXY_FLAGS, Host, Scene
from tests.netns.lab import run
from tpctl.rehearsal.cgroup import OwnPlace, own_place
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Layout
from tpctl.rehearsal.rehearse import expectation
from tpctl.spec.decide import decide
from tpctl.spec.document import from_document
from tpctl.spec.policy import Policy

_ENGINES = ("nftables", "iptables nft", "iptables legacy")
_FOREIGN_ROUNDS = 200
_FOREIGN = f"""
i=0
while test ! -e /run/stop -a $i -lt {_FOREIGN_ROUNDS}; do
    i=$((i + 1))
    for tool in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
        rule="OUTPUT -p udp --dport $((20000 + i)) -m comment --comment site-$i -j ACCEPT"
        $tool -w 10 -t nat -A $rule 2> /dev/null && echo "$tool $i" >> /run/added
    done
    nft add rule inet site watch udp dport $((20000 + i)) counter comment "site-$i" && echo "nft $i" >> /run/added
    sleep 0.02
done
"""
"""Without pauses and an end, nft and iptables-nft would read for ever: at every change they see they start anew."""
_TRACE = ("Traceback", "internal error")


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    commands: int
    exits: Counter[str] = field(default_factory=Counter)
    """By command and exit code."""
    faults: list[str] = field(default_factory=list)
    foreign: int = 0
    """Rules that the other program has added meanwhile."""
    end: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        exits = ", ".join(f"{what} {count} times" for what, count in sorted(self.exits.items()))
        lines = [f"{self.commands} commands in {self.seconds:.0f} s: {exits}"]
        lines.append(f"{self.foreign} foreign rules were added meanwhile; at the end: {self.end}")
        return "\n".join([*lines, *(f"    {fault}" for fault in self.faults)])


def at_once(count: int, place: OwnPlace, folder: Path, seed: int | None = None) -> Outcome:
    """Start `count` commands at once; hands back what is wrong, if anything."""
    chance = random.Random(seed)
    with Lab(Layout()) as lab:
        host = Host(lab, place, folder)
        try:
            scene = Scene(lab, host, "nftables")
            return _run(scene, [_command(number, chance) for number in range(count)])
        finally:
            host.close()


def _command(number: int, chance: random.Random) -> tuple[str, ...]:
    kind = chance.choices(("install", "uninstall", "status"), (7, 1, 2))[0]
    if kind != "install":
        return (kind,)
    ports = f"22,{7100 + number}"
    return ("install", *PROXY_FLAGS, "--exclude-outbound-ports", ports, *FLAVOURS[chance.choice(_ENGINES)])


def _run(scene: Scene, commands: Sequence[tuple[str, ...]]) -> Outcome:
    outcome = Outcome(len(commands))
    began = time.monotonic()
    with scene.lab.inside(HOST):
        foreign = subprocess.Popen([*scene.host.beside(), "sh", "-c", _FOREIGN])
        running = [
            (argv, subprocess.Popen([*scene.host.beside(), sys.executable, "-m", "tpctl.cli.main", *argv],
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
            for argv in commands
        ]  # fmt: skip
    try:
        for argv, process in running:
            _, err = process.communicate(timeout=600)
            outcome.exits[f"{argv[0]} exit {process.returncode}"] += 1
            outcome.faults += _complaint(argv, process.returncode, err)
    finally:
        scene.host.shell("touch /run/stop")
        for _, process in running:
            process.kill()
            process.communicate()
        foreign.wait(timeout=300)
    outcome.seconds = time.monotonic() - began
    _judge(scene, outcome)
    return outcome


def _complaint(argv: tuple[str, ...], code: int, err: str) -> list[str]:
    """A command ends well, or says who was in the way; `status` may find what is half-way done by another."""
    waited = "has held" in err or "is currently holding" in err or "try again" in err
    fine = code == 0 or (argv[0] == "status" and code == 3) or (code in (1, 2) and waited)
    if fine and not any(words in err for words in _TRACE):
        return []
    return [f"{' '.join(argv)}: exit {code}: {err.strip()}"]


def _judge(scene: Scene, outcome: Outcome) -> None:
    """The end is what the record says, to the last rule and for every connection; no foreign rule is lost."""
    found = json.loads(scene.host("status", "--json").out)
    policy = from_document(found["policy"]) if found["policy"] else None
    outcome.end = f"{found['engine']}, {found['variant']}" if found["installed"] else "nothing is installed"
    if bool(policy) != found["installed"]:
        outcome.faults.append(f"the record and the kernel contradict each other: {found}")
    outcome.faults += [*found["problems"], *found["drift"]]
    outcome.faults += _elsewhere(scene, policy)
    outcome.faults += _lost(scene, outcome)
    scene.uninstall()
    outcome.faults += [f"an uninstall leaves {path}" for path in scene.litter()]
    if (seen := scene.seen()) != scene.expected("none"):
        outcome.faults.append(f"after the uninstall connections end elsewhere: {seen}")
    with scene.lab.inside(HOST):
        rest = "".join(run([f"{tool}-save"]).stdout for tool in ("iptables-nft", "iptables-legacy"))
    if "TPCTL_" in rest:
        outcome.faults.append("an uninstall leaves rules")


def _elsewhere(scene: Scene, policy: Policy | None) -> list[str]:
    seen = scene.seen()
    if policy is None:
        wanted = scene.expected("none")
    else:
        layout = scene.lab.layout
        wanted = {name: str(expectation(layout, decide(policy, one), one)) for name, one in scene.connections.items()}
    return [f"{name} ends at {seat}, not {wanted[name]}" for name, seat in seen.items() if seat != wanted[name]]


def _lost(scene: Scene, outcome: Outcome) -> list[str]:
    added = scene.host.files("/run").get("/run/added", "").split("\n")
    with scene.lab.inside(HOST):
        tools = ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy")
        held = {tool: run([f"{tool}-save", "-t", "nat"]).stdout for tool in tools}
        held["nft"] = run(["nft", "list", "table", "inet", "site"]).stdout
    rules = [line.split() for line in added if line]
    outcome.foreign = len(rules)
    if not rules:
        return ["the foreign program could not add a single rule"]
    words = {tool: set(text.replace('"', " ").split()) for tool, text in held.items()}
    lost = [f"{tool} {number}" for tool, number in rules if f"site-{number}" not in words[tool]]
    return [f"foreign rules were lost: {', '.join(lost)}"] if lost else []


def main(count: int) -> bool:
    """Print what came of it; whether all is well."""
    with own_place() as place, tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        outcome = at_once(count, place, Path(folder))
    print(outcome)
    return not outcome.faults

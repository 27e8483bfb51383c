"""What tells why a scenario failed, before the next one goes back to a machine that knows nothing of it."""

from __future__ import annotations

import subprocess

from tests.vm import endings
from tests.vm.machine import Machine

_QUESTIONS = {
    "journal": "journalctl --no-pager --boot --output=short-monotonic",
    "sockets": "ss --tcp --all --numeric --processes --extended --options",
    "conntrack": "conntrack -L; conntrack -L -f ipv6; conntrack -S",
    "rules": "nft list ruleset",
    "processes": "ps auxww; cat /proc/meminfo",
}
_SHOWN = 40
"""Connections that are listed in the report: the last ones."""


def keep(machine: Machine, name: str) -> str:
    """Write what the machine knows into its folder; hands back where that is, and who ended which connection."""
    folder = machine.folder / f"failed-{name}"
    folder.mkdir(exist_ok=True)
    for title, question in _QUESTIONS.items():
        (folder / title).write_text(_answer(machine, question))
    (folder / "console").write_text(machine.console)
    said = [f"The machine's journal, sockets, rules and console are in {folder}."]
    if machine.capture.exists():
        kept = machine.capture.rename(folder / machine.capture.name)  # qemu goes on writing to it
        seen = endings.connections(kept.read_bytes())
        said += [f"{len(seen)} connections in {kept}, times of the machine's clock; the last of them:"]
        said += map(str, seen[-_SHOWN:])
    return "\n".join(said)


def _answer(machine: Machine, question: str) -> str:
    """Over a connection of its own: the shared one may be what is lost."""
    try:
        done = machine.run_anew(question, check=False)
    except subprocess.TimeoutExpired as late:
        return str(late)
    return f"{done.stdout}{done.stderr}"

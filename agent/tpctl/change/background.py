"""Commands of tpctl's own that go on when the one that started them has ended, with its terminal and its session."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tpctl
from tpctl.host.proc import in_first_namespace
from tpctl.system import detached, runner
from tpctl.system.errors import ApplyError, TpctlError

SYSTEMD_RUNS = Path("/run/systemd/system")
"""sd_booted(3)."""


def argv(*words: str) -> list[str]:
    """What runs a command of tpctl."""
    return [sys.executable, "-m", "tpctl.cli.main", *words]


def unit_argv(unit: str, description: str, properties: Sequence[str], command: Sequence[str]) -> list[str]:
    """What makes systemd run a command in a transient unit, by options such as `properties` (systemd-run(1))."""
    return [
        "systemd-run",
        "--quiet",
        "--collect",
        f"--unit={unit}",
        f"--description={description}",
        *properties,
        *(f"--setenv={name}={value}" for name, value in _environment().items()),
        *command,
    ]


def start_unit(asking: Sequence[str]) -> bool:
    """Ask systemd by `unit_argv`, where it runs this network namespace; whether it does what was asked."""
    if not systemd_runs_here():
        return False
    try:
        return runner.run(list(asking)).ok
    except (FileNotFoundError, TpctlError):
        return False


def systemd_runs_here() -> bool:
    """Whether systemd runs, and in this network namespace: its units would see another one's rules otherwise."""
    return in_first_namespace() and SYSTEMD_RUNS.is_dir()


def start_process(command: Sequence[str]) -> None:
    """Start it as a process with a session of its own. Raises ApplyError when it cannot be started."""
    try:
        detached.start(command, _environment())
    except OSError as error:  # no process, or no pipe, to be had
        raise ApplyError(f"{command[0]} cannot be started: {error.strerror}") from error


def _environment() -> dict[str, str]:
    """It finds the package where this process found it, whatever the working directory."""
    home = str(Path(tpctl.__file__).resolve().parents[1])
    others = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one and one != home]
    return {**runner.ENVIRONMENT, "PYTHONPATH": os.pathsep.join([home, *others])}

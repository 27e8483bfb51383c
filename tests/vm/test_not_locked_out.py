"""An operator who forgot everything keeps the session, gets a new one, and can let time heal the rest."""

from __future__ import annotations

import time

import pytest

from tests.vm.capture import world
from tests.vm.conftest import in_the_matrix
from tests.vm.machine import Machine

pytestmark = [pytest.mark.root, in_the_matrix]

SECONDS = 20


def can_log_in(machine: Machine) -> bool:
    """Whether a new session can be opened."""
    return machine.run_anew("true", check=False).returncode == 0


def test_the_session_survives_an_install_that_excludes_nothing(machine: Machine) -> None:
    idle = machine.session()
    done = machine.run_anew("tpctl install --kuma-dp-user kuma-dp")
    assert "inbound port 22 is not redirected" in done.stderr
    assert "--no-ssh-guard" in done.stderr
    assert idle.is_alive()
    assert can_log_in(machine)
    problems = " ".join(machine.status()["problems"])
    assert "nothing listens on tcp port 15006" in problems
    assert "nothing listens on tcp port 15001" in problems
    idle.cut()


def test_what_nobody_confirms_is_taken_back(machine: Machine) -> None:
    before = world(machine)
    operator = machine.session()
    install = f"tpctl install --kuma-dp-user kuma-dp --no-ssh-guard --confirm-within {SECONDS}s"
    operator.send(f"exec {install} > /root/said 2>&1; exit")
    machine.wait_for(lambda: "tpctl confirm" in machine.said("cat /root/said"), "nothing was installed")
    began = time.monotonic()
    operator.cut()
    assert "tpctl-rollback-" in machine.said("systemctl list-timers --no-legend")
    assert not can_log_in(machine)  # nobody listens where ssh was redirected to
    machine.wait_for(lambda: can_log_in(machine), "the operator stays locked out", seconds=10 * SECONDS)
    print(f"\nback after {time.monotonic() - began:.0f} s")
    assert world(machine) == before
    assert machine.status()["installed"] is False
    assert "was not confirmed in time" in machine.said("journalctl --no-pager -t tpctl")

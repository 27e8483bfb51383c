"""Many commands at the same time (`make test-crash` starts 50)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.at_once import at_once
from tpctl.rehearsal.cgroup import own_place

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup", "interception", "legacy")]

COMMANDS = 20


def test_every_command_ends_well_and_nothing_foreign_is_lost(tmp_path: Path) -> None:
    with own_place() as place:
        outcome = at_once(COMMANDS, place, tmp_path)
    assert not outcome.faults, str(outcome)

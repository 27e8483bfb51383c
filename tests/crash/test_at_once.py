"""Many commands at the same time (`make test-crash` starts 50)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.at_once import at_once
from tests.extent import IS_WHOLE
from tpctl.rehearsal.cgroup import own_place

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup", "interception", "legacy")]

COMMANDS = 20
SEED = None if IS_WHOLE else 1
"""`make test` always starts the same ones, `make test-all` any."""


def test_every_command_ends_well_and_nothing_foreign_is_lost(tmp_path: Path) -> None:
    with own_place() as place:
        outcome = at_once(COMMANDS, place, tmp_path, SEED)
    assert not outcome.faults, str(outcome)

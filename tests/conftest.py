"""What every test shares."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import hypothesis
import pytest

from agent import state
from tests.netns.lab import TOUCHED

# How long an example takes, or its generation, says more about what else the machine does than about the code.
hypothesis.settings.register_profile("tpctl", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tpctl")

# Root takes configurations only from files that nobody else may change, and tests write many.
os.umask(0o022)


@pytest.fixture(scope="session", autouse=True)
def _no_records_left() -> Iterator[None]:
    """Namespaces vanish with what is installed in them; the records of those that tests used go too."""
    yield
    for key in TOUCHED:
        shutil.rmtree(state.DIRECTORY / key, ignore_errors=True)
        (state.DIRECTORY / f"{key}.lock").unlink(missing_ok=True)

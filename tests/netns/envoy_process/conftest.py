"""What these tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.envoy_process import plant


@pytest.fixture(autouse=True)
def _none_outlives_its_test() -> Iterator[None]:
    """A test that fails may leave one behind, which holds its namespace. Those of fixtures of modules are older."""
    before = len(plant.STARTED)
    yield
    for process in plant.STARTED[before:]:
        if process.poll() is None:
            process.kill()  # Envoy ends with it
            process.wait()
    del plant.STARTED[before:]

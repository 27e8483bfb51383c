"""Fixtures of the eBPF engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.engines.ebpf_scene import Scene, laboratory
from tpctl.rehearsal.cgroup import OwnPlace, own_place


@pytest.fixture
def place() -> Iterator[OwnPlace]:
    with own_place() as made:
        yield made


@pytest.fixture
def scene(place: OwnPlace) -> Iterator[Scene]:
    with laboratory(place) as made:
        yield made

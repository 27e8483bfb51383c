"""What the tests in scratch namespaces share. None of them touches the machine's own rules, routes or addresses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import relay_net


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root when there is none."""
    if os.geteuid() == 0:
        return
    needs_root = pytest.mark.skip(reason="needs root: network namespaces are made")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(needs_root)


@pytest.fixture(params=["nft", "legacy"])
def variant(request: pytest.FixtureRequest) -> str:
    """Each variant of iptables in turn."""
    return str(request.param)


@pytest.fixture
def directory() -> Iterator[Path]:
    """What the relay can read as its user, again and again, unlike `tmp_path`."""
    with relay_net.public_directory() as made:
        yield made

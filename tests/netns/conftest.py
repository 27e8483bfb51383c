"""What the tests in scratch namespaces share. None of them touches the machine's own rules, routes or addresses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net


@pytest.fixture(params=["nft", "legacy"])
def variant(request: pytest.FixtureRequest) -> str:
    """Each variant of iptables in turn."""
    return str(request.param)


@pytest.fixture
def directory() -> Iterator[Path]:
    """What the relay can read as its user, again and again, unlike `tmp_path`."""
    with relay_net.public_directory() as made:
        yield made

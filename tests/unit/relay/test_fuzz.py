"""A short run of `make fuzz`, and that it finds what it looks for."""

from __future__ import annotations

import pytest

from tests.fuzz import relay, relay_dns
from tests.fuzz.mutate import mutations
from tests.fuzz.relay import Target, run


@pytest.mark.parametrize("target", [*relay.TARGETS, *relay_dns.TARGETS], ids=lambda target: target.name)
def test_random_input_is_read_or_refused(target: Target) -> None:
    assert "no crash" in run(target, 1000, seed=7)


def test_a_crash_is_reported_with_its_input() -> None:
    def broken(data: bytes) -> None:
        assert data[:1] != b"\0"

    with pytest.raises(AssertionError, match="seed 1: b'"):
        run(Target("broken", broken, [b"abc"]), 5000, 1)


def test_a_seed_can_be_run_again() -> None:
    assert list(mutations([b"abc", b"xyz"], 50, 3)) == list(mutations([b"abc", b"xyz"], 50, 3))

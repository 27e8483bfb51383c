"""How much of a long suite runs: the slice of it that `make test` has, or the whole, as in `make test-all`.

Targets of one suite say so too: TPCTL_TESTS=all, and its folder."""

from __future__ import annotations

import os

import pytest

IS_WHOLE = os.environ.get("TPCTL_TESTS") == "all"
takes_long = pytest.mark.skipif(not IS_WHOLE, reason="takes long: part of make test-all")


def share(some: int, whole: int) -> int:
    """What `make test` makes do with, or what `make test-all` takes."""
    return whole if IS_WHOLE else some

"""`make demo-l7`."""

from __future__ import annotations

import sys

import pytest

from tests.netns.lab import run

pytestmark = pytest.mark.root


def test_everything_held() -> None:
    done = run([sys.executable, "-m", "tests.demo_l7"], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "everything held: 38 attempts"
    assert "WRONG" not in done.stdout

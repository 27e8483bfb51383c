"""`make demo`, in both variants."""

from __future__ import annotations

import sys

import pytest

from tests import demo
from tests.netns.lab import run

pytestmark = pytest.mark.root


def test_everything_held(variant: str) -> None:
    done = run([sys.executable, "-m", "tests.demo", variant], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("everything held")
    assert sum(line.endswith(" ok") for line in lines) == len(demo.rows())
    assert "WRONG" not in done.stdout


def test_usage() -> None:
    assert run([sys.executable, "-m", "tests.demo", "both"], check=False).returncode == 2


def test_a_difference_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert not demo.compare({"iptables-nft-save": "*nat\nCOMMIT\n"}, {"iptables-nft-save": "*nat\n-A X\nCOMMIT\n"})
    assert "+-A X" in capsys.readouterr().out


def test_a_wrong_answer_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = demo.rows()[:1]
    right, wrong = [("application", True)], [("refused", False)]
    assert not demo.report(wanted, right, wrong, right)
    assert "WRONG" in capsys.readouterr().out
    assert demo.report(wanted, right, right, right)

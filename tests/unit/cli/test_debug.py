"""`--debug` adds a traceback, wherever it stands, and changes nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

BAD_INPUT = {
    "install": ("--wait", "x"),
    "verify": ("--wait", "x"),
    "explain": ("outbound", "--to", "10.1.2.3:443", "--wait", "x"),
    "uninstall": ("something",),
    "relay": ("--workers", "0"),
    "relay --config": ("--config", "/nonexistent"),
    "top": ("--config", "/nonexistent"),
}


def tpctl(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tpctl.cli.main", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_stays_bad_input(name: str) -> None:
    command, words = name.split(" ")[0], BAD_INPUT[name]
    plain, before, behind = tpctl(command, *words), tpctl("--debug", command, *words), tpctl(command, *words, "--debug")
    assert [done.returncode for done in (plain, before, behind)] == [2, 2, 2], plain.stderr
    assert "Traceback" not in plain.stderr
    for done in (before, behind):
        assert done.stderr.endswith(plain.stderr)
        assert "Traceback" in done.stderr


def test_words_that_click_refuses() -> None:
    assert [tpctl(*words).returncode for words in (("--debug", "none-such"), ("persist", "--debug", "--no"))] == [2, 2]


def test_the_value_of_another_option_is_none() -> None:
    done = tpctl("install", "--print-config", "--config", "--debug")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)

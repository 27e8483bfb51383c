"""`tpctl persist` on an image, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.persist.test_systemd import root, tree

__all__ = ["root"]
pytestmark = pytest.mark.root


def persist(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "agent.cli.main", "persist", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_an_image_is_prepared_and_cleaned(root: Path) -> None:
    before = tree(root)
    shown = persist("--systemd", "--root", str(root))
    assert shown.returncode == 0, shown.stderr
    assert "next boot: tpctl.service installs what /etc/tpctl/config.yaml says" in shown.stdout
    found = json.loads(persist("--root", str(root), "--json").stdout)
    assert found == {"done": [], "notices": [], "nextBoot": [shown.stdout.splitlines()[-1].removeprefix("next boot: ")]}
    assert "next boot: nothing of tpctl's" in persist("--remove", "--root", str(root)).stdout
    assert {name for name in tree(root) if not name.startswith("etc/systemd")} == set(before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--remove", "--systemd"], "give it alone"),
        (["--firewalld", "--root", "/tmp"], "does not go with --root"),
        (["--systemd", "--root", "/usr/share"], "print-config"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str) -> None:
    done = persist(*arguments)
    assert done.returncode == 2
    assert said in done.stderr

"""`tpctl persist` on an image, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.schemas import validated
from tests.unit.persist.test_systemd import root, tree

__all__ = ["root"]
pytestmark = pytest.mark.root


def persist(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tpctl.cli.main", "persist", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_an_image_is_prepared_and_cleaned(root: Path) -> None:
    before = tree(root)
    shown = persist("--systemd", "--root", str(root))
    assert shown.returncode == 0, shown.stderr
    assert f"next boot: tpctl.service installs what {root}/etc/tpctl/config.yaml says" in shown.stdout
    found = validated(persist("--root", str(root), "--json").stdout)
    told = {name: found[name] for name in ("done", "notices", "nextBoot")}
    assert told == {"done": [], "notices": [], "nextBoot": [shown.stdout.splitlines()[-1].removeprefix("next boot: ")]}
    assert "next boot: nothing from tpctl" in persist("--remove", "--root", str(root)).stdout
    assert {name for name in tree(root) if not name.startswith("etc/systemd")} == set(before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--remove", "--systemd"], "use it alone"),
        (["--firewalld", "--root", "/tmp"], "cannot be combined with --root"),
        (["--systemd", "--root", "/usr/share"], "print-config"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str) -> None:
    done = persist(*arguments)
    assert done.returncode == 2
    assert said in done.stderr

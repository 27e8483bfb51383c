"""The checkout as it would be released: `python -m tests.vm.wheel FOLDER` leaves its wheel in a folder.

No network is needed: `make dev` installs the setuptools that builds it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vm.initramfs import CHECKOUT

PART_OF_THE_PACKAGE = ("agent", "bpf", "systemd", "pyproject.toml", "README.md", "LICENSE")


def wheel(folder: Path) -> Path:
    """Build it from a copy, which has no leftovers of earlier builds. Raises subprocess.CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("tpctl-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as source:
        for name in PART_OF_THE_PACKAGE:
            subprocess.run(["cp", "-a", str(CHECKOUT / name), source], check=True)
        words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        subprocess.run([*words, "--wheel-dir", str(folder), source], check=True)
    return next(folder.glob("tpctl-*.whl"))


if __name__ == "__main__":
    print(wheel(Path(sys.argv[1])))

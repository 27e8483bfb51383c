"""Files as root reads them, and what is said of those that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpctl.system.input_files import UnusableFileError, read_configuration

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files change their owner")
POLICY = "redirect: {inbound: {port: 15006}}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "tpctl.yaml"
    made.write_text(POLICY)
    made.chmod(0o644)
    return made


def refusal(path: Path | str) -> str:
    with pytest.raises(UnusableFileError) as refused:
        read_configuration(str(path))
    said = str(refused.value)
    assert "\n" not in said
    return said

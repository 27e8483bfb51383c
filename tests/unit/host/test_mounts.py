"""Where file systems are mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.host import mounts


def test_a_path_is_read_as_the_kernel_escapes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    line = r"31 23 0:27 / /run/an\040odd\134place rw,relatime shared:9 - cgroup2 none rw" + "\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: line)
    assert mounts.mounts("self", "cgroup2") == [Path("/run/an odd\\place")]

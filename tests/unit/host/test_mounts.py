"""Where file systems are mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpctl.host import mounts
from tpctl.system.errors import HostError


def test_a_path_is_read_as_the_kernel_escapes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    line = r"31 23 0:27 / /run/an\040odd\134place rw,relatime shared:9 - cgroup2 none rw" + "\n"
    monkeypatch.setattr("tpctl.system.text.read", lambda _: line)
    assert mounts.mounts("self", "cgroup2") == [Path("/run/an odd\\place")]


def test_a_place_of_process_1_is_reached_through_its_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mounts, "_FIRST", tmp_path)
    (tmp_path / "sys/fs/bpf").mkdir(parents=True)
    assert mounts.of_first(Path("/sys/fs/bpf")) == tmp_path / "sys/fs/bpf"
    with pytest.raises(HostError, match=r"^/sys/fs/cgroup of this host is out of reach \(.*: No such"):
        mounts.of_first(Path("/sys/fs/cgroup"))

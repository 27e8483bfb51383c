"""Files of the administrator: replaced whole or not at all, and dressed as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpctl.persist import files
from tpctl.system.errors import ApplyError, HostError

CONTEXT = b"system_u:object_r:firewalld_etc_rw_t:s0\0"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "direct.xml"
    path.write_text("old")
    return path


def test_a_new_file_has_the_mode_asked_for(tmp_path: Path) -> None:
    files.replace(tmp_path / "new", b"x", mode=0o640)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


@pytest.mark.root
def test_mode_owner_and_selinux_context_stay(file: Path) -> None:
    file.chmod(0o604)
    os.chown(file, 12, 34)
    try:
        os.setxattr(file, files.SELINUX, CONTEXT)
    except OSError:
        pytest.skip("this file system keeps no SELinux context")
    files.replace(file, b"new", mode=0o640)
    found = file.stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o604, 12, 34)
    assert os.getxattr(file, files.SELINUX) == CONTEXT
    assert file.read_bytes() == b"new"


def test_a_symbolic_link_stays_one(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    files.replace(link, b"new", mode=0o640)
    assert link.is_symlink()
    assert file.read_text() == "new"


@pytest.mark.parametrize("linked", [True, False])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, linked: bool) -> None:
    # A pipe stands for /dev/null, to which a masked unit is a link: without the check, root would lose it here.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    place = tmp_path / "tpctl.service" if linked else pipe
    if linked:
        place.symlink_to(pipe)
    with pytest.raises(ApplyError, match=r"pipe is not a file; it is unchanged"):
        files.replace(place, b"new", mode=0o644)
    assert pipe.is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", place.name}


@pytest.mark.parametrize("step", ["fsync", "fchmod", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(file: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path if step == "replace" else os, step, fail)
    with pytest.raises(ApplyError, match="No space left on device; it is unchanged"):
        files.replace(file, b"new", mode=0o640)
    monkeypatch.undo()
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_killed_before_the_rename_the_old_file_counts(file: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from tpctl.persist import files\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "files.replace(Path(sys.argv[1]), b'new', mode=0o640)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(file)], check=False).returncode == -9
    assert file.read_text() == "old"
    assert len(list(file.parent.iterdir())) == 2
    files.replace(file, b"newer", mode=0o640)
    assert list(file.parent.iterdir()) == [file]


def test_reading(file: Path, tmp_path: Path) -> None:
    assert files.read(file) == b"old"
    assert files.read(tmp_path / "none") is None
    with pytest.raises(HostError, match="Is a directory"):
        files.read(tmp_path)


def test_removing(file: Path, tmp_path: Path) -> None:
    assert files.remove(file)
    assert not files.remove(file)
    with pytest.raises(ApplyError, match="cannot be removed"):
        files.remove(tmp_path)

"""Folders and locks that somebody else has planted, or may change: the cache of programs, pins, temporary files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpctl.bpf import build
from tpctl.bpf.build import Build
from tpctl.bpf.programs import MAPS, PROGRAMS
from tpctl.bpf.syscall import Shape
from tpctl.engines.ebpf.place import Place
from tpctl.engines.iptables import legacy
from tpctl.persist import files
from tpctl.system import private_folder, runner
from tpctl.system.errors import ApplyError
from tpctl.system.input_files import read_private

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files change their owner")
BUILT = Build(
    {program.name: bytes(8) for program in PROGRAMS},
    {name: Shape(**dict.fromkeys(Shape.__dataclass_fields__, 1)) for name in MAPS},
)


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    private_folder.prepare(tmp_path / "a/b", 0o700)
    private_folder.prepare(tmp_path / "a/b", 0o700)
    assert (tmp_path / "a/b").stat().st_mode & 0o7777 == 0o700
    assert private_folder.is_private(tmp_path / "a/b")
    assert not private_folder.is_private(tmp_path / "none")


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777])
def test_what_is_made_has_its_mode_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        private_folder.prepare(tmp_path / "a/b/c")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    for made in ("a", "a/b", "a/b/c"):
        assert (tmp_path / made).stat().st_mode & 0o7777 == 0o755


@needs_root
@pytest.mark.parametrize(("owner", "mode"), [(NOBODY, 0o755), (0, 0o777), (0, 0o1777), (NOBODY, 0o000)])
def test_a_folder_of_others_becomes_roots(tmp_path: Path, owner: int, mode: int) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    os.chown(folder, owner, owner)
    folder.chmod(mode)
    assert not private_folder.is_private(folder)
    private_folder.prepare(folder)
    assert (folder.stat().st_uid, folder.stat().st_mode & 0o7777) == (0, 0o755)


def test_a_link_in_place_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="link is a symbolic link; remove it"):
        private_folder.prepare(tmp_path / "link")
    with pytest.raises(OSError, match="file is not a directory; remove it"):
        private_folder.prepare(tmp_path / "file")
    assert not private_folder.is_private(tmp_path / "link")


@needs_root
def test_a_private_file_is_a_plain_one_of_roots(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_text("x")
    assert read_private(good, 10) == b"x"
    (tmp_path / "link").symlink_to(good)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("x" * 11)
    for name in ("open", "nobodys"):
        (tmp_path / name).write_text("x")
    (tmp_path / "open").chmod(0o666)
    os.chown(tmp_path / "nobodys", NOBODY, NOBODY)
    for name in ("link", "fifo", "large", "open", "nobodys", "none"):
        with pytest.raises(OSError):
            read_private(tmp_path / name, 10)


@needs_root
def test_the_cache_of_programs_is_only_believed_and_written_where_root_alone_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    victim.mkdir()
    (victim / "ebpf-old.json").write_text("the victim's")
    cache.symlink_to("victim")
    build._keep(cache / "ebpf-new.json", BUILT)
    assert build._cached(cache / "ebpf-old.json") is None
    monkeypatch.setattr(build, "CACHE", cache)
    assert build.forget() == ()
    assert [path.name for path in victim.iterdir()] == ["ebpf-old.json"]
    cache.unlink()
    build._keep(cache / "ebpf-new.json", BUILT)
    assert build._cached(cache / "ebpf-new.json") == BUILT
    os.chown(cache / "ebpf-new.json", NOBODY, NOBODY)
    assert build._cached(cache / "ebpf-new.json") is None
    (cache / "ebpf-link.json").symlink_to(victim / "ebpf-old.json")
    assert build._cached(cache / "ebpf-link.json") is None
    build._keep(cache / "ebpf-other.json", BUILT)
    assert [path.name for path in cache.iterdir()] == ["ebpf-other.json"]
    assert (victim / "ebpf-old.json").read_text() == "the victim's"
    cache.chmod(0o777)
    assert build._cached(cache / "ebpf-other.json") is None


@needs_root
def test_the_folder_of_pins_is_roots_alone(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path)
    (tmp_path / "tpctl").mkdir(mode=0o777)
    os.chown(tmp_path / "tpctl", NOBODY, NOBODY)
    place.make_folder()
    for folder in (place.folder, place.folder.parent):
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o7777) == (0, 0o700)
        folder.chmod(0o755)
    place.folder.rmdir()
    place.folder.symlink_to(tmp_path)
    with pytest.raises(ApplyError, match=r"is a symbolic link; remove it\. Nothing was changed"):
        place.make_folder()


def test_the_lock_of_iptables_is_not_followed_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").write_text("x")
    monkeypatch.setattr(legacy, "LOCK", tmp_path / "xtables.lock")
    legacy.LOCK.symlink_to("victim")
    with pytest.raises(OSError, match="symbolic links"), legacy.xtables_lock(0):
        pass
    legacy.LOCK.unlink()
    os.mkfifo(legacy.LOCK)
    with legacy.xtables_lock(0):
        pass
    legacy.LOCK.unlink()
    with legacy.xtables_lock(0):
        assert legacy.LOCK.stat().st_mode & 0o7777 == 0o600
    assert (tmp_path / "victim").read_text() == "x"


def test_temporary_files_of_others_are_removed_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("x")
    (tmp_path / ".tpctl-direct.xml-x").symlink_to("victim")
    files.replace(tmp_path / "direct.xml", b"new", mode=0o640)
    assert (tmp_path / "victim").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct.xml", "victim"]
    assert (tmp_path / "direct.xml").stat().st_mode & 0o7777 == 0o640


def test_programs_get_a_fixed_environment_and_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env").write_text("#!/bin/sh\necho planted\n")
    (tmp_path / "env").chmod(0o755)
    for name in ("LD_PRELOAD", "BASH_ENV", "IFS", "PYTHONPATH", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "env"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert runner.run(["env"]).stdout.splitlines() == [f"{name}={value}" for name, value in runner.ENVIRONMENT.items()]
    text = "$(touch owned); `touch owned` | tee owned > owned & '\""
    assert runner.run(["printf", "%s", text]).stdout == text
    with pytest.raises(FileNotFoundError):
        runner.run([f"true; touch {tmp_path}/owned"])
    assert not (tmp_path / "owned").exists()

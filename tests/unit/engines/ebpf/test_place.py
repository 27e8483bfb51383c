"""Where the BPF file system and cgroup2 are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpctl.engines.ebpf import place
from tpctl.host import cgroups
from tpctl.spec.policy import Cgroup
from tpctl.system.errors import HostError

BPFFS = place.BPFFS
Mounts = dict[tuple[str, str], list[Path]]


def seen(monkeypatch: pytest.MonkeyPatch, mounts: Mounts, numbers: dict[str, set[str]] | None = None) -> None:
    """Let processes see these file systems, by process and kind, and mounts of these ids."""
    shared = {"thread-self": {"1", "2"}, "1": {"1", "2"}}
    monkeypatch.setattr(place, "mounts", lambda process, kind: mounts.get((process, kind), []))
    monkeypatch.setattr(place, "mount_numbers", (numbers or shared).__getitem__)


def test_the_usual_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, {("thread-self", "bpf"): [BPFFS]})
    assert place.bpffs() == BPFFS


def test_behind_the_private_sys_of_ip_netns_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, {("1", "bpf"): [BPFFS]}, {"thread-self": {"7"}, "1": {"1"}})
    monkeypatch.setattr(place, "of_first", lambda found: Path("/proc/1/root", *found.parts[1:]))
    assert place.bpffs() == Path("/proc/1/root/sys/fs/bpf")


def test_behind_a_process_1_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(found: Path) -> Path:
        raise HostError(f"{found} of this host is out of reach")

    seen(monkeypatch, {("1", "bpf"): [BPFFS]}, {"thread-self": {"7"}, "1": {"1"}})
    monkeypatch.setattr(place, "of_first", refused)
    with pytest.raises(HostError, match=r"the BPF file system /sys/fs/bpf of this host is out of reach; use --engine"):
        place.bpffs()


def test_one_that_is_not_mounted_yet_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, {})
    assert place.bpffs() == BPFFS


def test_none_is_mounted_where_it_would_end_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, {}, {"thread-self": {"7"}, "1": {"1"}})
    with pytest.raises(HostError, match=r"mount -t bpf bpf /sys/fs/bpf"):
        place.bpffs()


def test_a_container_that_may_not_look_at_process_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def mounts(process: str, _kind: str) -> list[Path]:
        if process == "1":
            raise PermissionError(13, "Permission denied")
        return []

    monkeypatch.setattr(place, "mounts", mounts)
    assert place.bpffs() == BPFFS


def test_a_directory_that_holds_no_cgroups(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=f"{tmp_path}/gone is not a directory of control groups"):
        place.find(tmp_path / "gone", tmp_path)


def test_the_applications_cgroup_is_the_whole_host_unless_chosen(tmp_path: Path) -> None:
    whole = place.Place(tmp_path, tmp_path)
    assert whole.applications(None) == tmp_path
    assert whole.applications(Cgroup("system.slice/app.service", 7)) == cgroups.root() / "system.slice/app.service"


def test_names_of_namespaces() -> None:
    assert place.Netns(7, True, 4026531840).key == "netns-7"
    assert place.Netns(4026531840, False, 4026531840).key == "netns-inode-4026531840"
    assert place.netns() == place.netns()

"""Hosts on which something is full, held, hanging or missing: rolled back, one message, and what connections see."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.scene import Done, Host, Scene
from tpctl.rehearsal.cgroup import OwnPlace, own_place
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Layout

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup", "interception", "legacy")]

WRAPPER = """\
#!/bin/sh
case "$0 $*" in
    *restore*) {restore};;
esac
exec /usr/sbin/$(basename "$0" | sed 's/tables/tables-nft/') "$@"
"""
NAMES = [f"{main}{verb}" for main in ("iptables", "ip6tables") for verb in ("", "-save", "-restore")]


@pytest.fixture
def place() -> Iterator[OwnPlace]:
    with own_place() as made:
        yield made


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(Layout()) as made:
        yield made


@pytest.fixture
def host(lab: Lab, place: OwnPlace, tmp_path: Path) -> Iterator[Host]:
    made = Host(lab, place, tmp_path)
    try:
        yield made
    finally:
        made.close()


def one_message(done: Done) -> str:
    """The error of a command that failed as it should."""
    assert done.exit == 1, str(done)
    lines = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.err
    assert "internal error" not in lines[0]
    assert "Traceback" not in done.err
    return lines[0]


@pytest.mark.parametrize("flavour", ["nftables", "iptables legacy"])
def test_a_full_disk_under_run(host: Host, lab: Lab, flavour: str) -> None:
    scene = Scene(lab, host, flavour)
    scene.install("old")
    outcomes = []
    for pages in range(5):
        host.shell("mkdir -p /run/full")
        host.shell("mount -t tmpfs -o size=64k none /run/full")
        # The record moves to the small disk, and what is free there is `pages` pages.
        host.shell("cp -a /run/tpctl/. /run/full/; mount --move /run/full /run/tpctl")
        host.shell("dd if=/dev/zero of=/run/tpctl/.filler bs=4096 2> /dev/null || true")
        host.shell(f"truncate -s -{4096 * pages} /run/tpctl/.filler || true")
        done = host(*scene.argv("new"))
        outcomes.append(done.exit)
        if done.exit:
            assert "No space left on device. Nothing was changed" in one_message(done)
            assert scene.seen() == scene.expected("old")
            assert "installing" not in host("status").out
        else:
            assert scene.seen() == scene.expected("new")
        host.ok("uninstall")  # needs no room at all
        assert scene.seen() == scene.expected("none")
        host.shell("umount /run/tpctl; rm -rf /run/tpctl /run/full /run/mount")
        scene.install("old")
    assert {0, 1} == set(outcomes), outcomes
    scene.uninstall()
    assert scene.held() == scene.base


@pytest.mark.skipif(not shutil.which("firewall-offline-cmd"), reason="no firewalld here")
@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_etc_cannot_be_written(host: Host, lab: Lab, trouble: str) -> None:
    scene = Scene(lab, host, "iptables nft, firewalld")
    scene.install("old")
    before = scene.held()
    if trouble == "full":
        host.shell("mkdir /run/kept; cp -a /etc/firewalld/. /run/kept/")
        host.shell("mount -t tmpfs -o size=64k none /etc/firewalld")
        host.shell("cp -a /run/kept/. /etc/firewalld/; rm -r /run/kept")
        host.shell("dd if=/dev/zero of=/etc/firewalld/filler bs=512 2> /dev/null || true")
    else:
        host.shell("mount -o remount,bind,ro /etc/firewalld")
    said = one_message(host(*scene.argv("new")))
    assert ("No space left on device" if trouble == "full" else "Read-only file system") in said
    assert "the policy that was installed before is carried out again" in said
    assert scene.seen() == scene.expected("old")
    after = scene.held()
    after.pop("/etc/firewalld/filler", None)
    changed = {path for path in after if after[path] != before.get(path) and not path.endswith(".lock")}
    assert not changed, "the record, and every file"
    done = host("uninstall")
    if trouble == "full":
        # Taking rules out of the file needs room for the new one, too.
        assert done.exit in (0, 1)
    assert scene.seen() == scene.expected("none"), "the kernel comes first"
    if done.exit:
        assert "no traffic is redirected" in one_message(done)
        host.shell("rm /etc/firewalld/filler" if trouble == "full" else "mount -o remount,bind,rw /etc/firewalld")
        host.ok("uninstall")
        host.shell("! grep -s TPCTL /etc/firewalld/direct.xml")


def test_a_read_only_etc_is_no_trouble_without_firewalld(host: Host, lab: Lab) -> None:
    scene = Scene(lab, host, "nftables")
    host.shell("mount --bind /etc /etc; mount -o remount,bind,ro /etc")
    scene.install("new")
    assert scene.seen() == scene.expected("new")


def test_the_xtables_lock_is_held(host: Host, lab: Lab) -> None:
    scene = Scene(lab, host, "iptables legacy")
    scene.install("old")
    with lab.inside(HOST):
        holder = subprocess.Popen(
            [*host.beside(), "flock", "/run/xtables.lock", "sh", "-c", "echo held; read line"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        done = host(*scene.argv("new"), "--wait", "1", "--max-retries", "0")
        said = one_message(done)
        assert "/run/xtables.lock" in said
        assert "othing was changed" in said
        assert scene.seen() == scene.expected("old")
    finally:
        holder.communicate("\n")
    scene.install("new")
    assert scene.seen() == scene.expected("new")
    scene.uninstall()
    assert scene.held() == scene.base


@pytest.mark.parametrize(
    ("restore", "problem"),
    [
        pytest.param("exec sleep 60", "did not end within 5 s and was killed", id="hangs"),
        pytest.param(
            'case "$0" in *ip6*) exec sleep 60;; esac', "did not end within 5 s and was killed", id="ip6-hangs"
        ),
        pytest.param(
            "echo \"iptables-restore v1.8.9 (nf_tables): Couldn't load match \\`owner'\" >&2; exit 2",
            "Couldn't load match",
            id="lacks-a-module",
        ),
        pytest.param(
            'case "$0" in *ip6*) echo "ip6tables-restore: line 7 failed: No chain/target/match by that name." >&2; '
            "exit 1;; esac",
            "No chain/target/match by that name",
            id="ip6-lacks-a-module",
        ),
    ],
)
def test_iptables_restore_that(host: Host, lab: Lab, tmp_path: Path, restore: str, problem: str) -> None:
    scene = Scene(lab, host, "iptables nft")
    scene.install("old")
    scripts = "/run/scripts"
    programs = ",".join(f"{name}:{scripts}/{name}" for name in NAMES)
    (tmp_path / "wrapper").write_text(WRAPPER.format(restore=restore))
    host.shell(f"mkdir {scripts}")
    for name in NAMES:
        host.shell(f"cat > {scripts}/{name} <<'END'\n{WRAPPER.format(restore=restore)}END\nchmod +x {scripts}/{name}")
    argv = [*scene.argv("new")[: -len(scene.flags)], "--engine", "iptables", "--iptables-executables", programs]
    said = one_message(host(*argv, "--max-retries", "0", patience=5.0))
    assert problem in said
    assert scene.seen() == scene.expected("old")
    assert "rolled back" in said or "was changed" in said or "as they were before" in said
    assert not scene.complaints()
    scene.uninstall()
    host.shell(f"rm -r {scripts}")
    assert scene.held() == scene.base


def test_bpffs_is_not_mounted(host: Host, lab: Lab) -> None:
    scene = Scene(lab, host, "ebpf")
    host.shell("while umount /sys/fs/bpf 2>/dev/null; do :; done")  # one of the machine, and one of the test
    assert host.shell("findmnt /sys/fs/bpf", check=False).exit == 1
    done = host(*scene.argv("new"))
    assert done.exit == 2, str(done)
    assert "no BPF file system is mounted at /sys/fs/bpf of this host; mount it" in done.err
    assert scene.seen() == scene.expected("none")
    host.shell("mount -t bpf bpf /sys/fs/bpf")
    scene.install("new")
    assert scene.seen() == scene.expected("new")
    scene.uninstall()
    assert scene.seen() == scene.expected("none")


def test_cgroup2_is_not_where_it_was(host: Host, lab: Lab) -> None:
    scene = Scene(lab, host, "ebpf")
    scene.install("old")
    host.shell("umount /run/cgroup")
    done = host(*scene.argv("new"))
    assert done.exit == 2, str(done)
    assert "cgroup2" in done.err
    assert scene.seen() == scene.expected("old"), "what is installed stays"
    host.ok("uninstall")  # needs no control groups
    assert scene.seen() == scene.expected("none")
    host.shell("mkdir '/run/an odd place'; mount -t cgroup2 none '/run/an odd place'")
    scene.install("new")
    assert scene.seen() == scene.expected("new")
    scene.uninstall()
    assert scene.seen() == scene.expected("none")

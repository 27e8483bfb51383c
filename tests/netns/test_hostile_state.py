"""/run/tpctl and what lies in it: planted by somebody else, damaged, gone. And what a local user can do with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.engines import test_ebpf_command
from tests.netns.engines.ebpf_command import Host as EbpfHost
from tests.netns.hostile_room import NOBODY, Room, ok, room
from tests.netns.lab import PROXY_USER, UNPRIVILEGED
from tpctl.record import state
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST

ebpf_lab, ebpf_host = test_ebpf_command.lab, test_ebpf_command.host

pytestmark = pytest.mark.root

SECRET = "the victim's\n"


@pytest.fixture(scope="module")
def host() -> Iterator[Room]:
    with room() as made:
        yield made


@pytest.fixture
def victim(host: Room) -> Iterator[Path]:
    """A directory of root's, with files of the names that tpctl uses."""
    folder = host.path("/run/victim")
    folder.mkdir()
    for name in ("state.json", "pending.json", ".state-before", "ebpf-0.json"):
        (folder / name).write_text(SECRET)
    yield folder
    left = {path.name: path.read_text() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert left == dict.fromkeys(("state.json", "pending.json", ".state-before", "ebpf-0.json"), SECRET)


def _link_folder(top: Path, key: str) -> None:
    (top / key).symlink_to("/run/victim")


def _link_record(top: Path, key: str) -> None:
    (top / key).mkdir()
    (top / key / "state.json").symlink_to("/run/victim/state.json")
    (top / key / "pending.json").symlink_to("/run/victim/pending.json")


def _pipes(top: Path, key: str) -> None:
    (top / key).mkdir()
    for name in (f"{key}/state.json", f"{key}/pending.json", f"{key}/.state-x", f"{key}.lock"):
        os.mkfifo(top / name)


def _folders(top: Path, key: str) -> None:
    for name in (f"{key}/state.json", f"{key}/pending.json", f"{key}.lock"):
        (top / name).mkdir(parents=True)
        (top / name / "inner").write_text("x")


def _link_lock(top: Path, key: str) -> None:
    (top / f"{key}.lock").symlink_to("/run/victim/state.json")


def _hard_link_lock(top: Path, key: str) -> None:
    os.link(top.parent / "victim/state.json", top / f"{key}.lock")


def _open_lock(top: Path, key: str) -> None:
    (top / f"{key}.lock").write_text("")
    (top / f"{key}.lock").chmod(0o666)


def _link_temporary(top: Path, key: str) -> None:
    (top / key).mkdir()
    (top / key / ".state-x").symlink_to("/run/victim")
    (top / key / ".state-before").symlink_to("/run/victim/state.json")


def _not_a_folder(top: Path, key: str) -> None:
    (top / key).write_text("x")


PLANTED = (
    _link_folder, _link_record, _pipes, _folders, _link_lock, _hard_link_lock, _open_lock, _link_temporary,
    _not_a_folder,
)  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: str(plant.__name__).strip("_"))
@pytest.mark.usefixtures("victim")
def test_what_is_planted_is_not_followed_and_goes(host: Room, plant: Callable[[Path, str], None]) -> None:
    before = host.rules()
    top = host.path("/run/tpctl")
    top.mkdir(exist_ok=True)
    plant(top, host.key())
    ok(host.install("--engine", "nftables"))
    lock = top / f"{host.key()}.lock"
    assert (lock.lstat().st_mode & 0o7777, lock.lstat().st_uid) == (0o600, 0)
    assert host.folder().lstat().st_uid == 0
    ok(host.tpctl("uninstall"))
    assert host.rules() == before
    assert not top.exists()


@pytest.mark.usefixtures("victim")
def test_a_link_in_place_of_the_whole_directory_is_named_and_does_not_bar_the_way_out(host: Room) -> None:
    before = host.rules()
    ok(host.install("--engine", "nftables"))
    top = host.path("/run/tpctl")
    top.rename(top.with_name("aside"))
    top.symlink_to("/run/victim")
    refused = host.install()
    assert refused.returncode == 1
    assert "/run/tpctl is a symbolic link; remove it. Nothing was changed" in refused.stderr
    assert refused.stderr.count("\n") == 1
    done = host.tpctl("uninstall")
    assert "/run/tpctl is a symbolic link; remove it; it was done without" in done.stderr
    assert ok(done)
    assert host.rules() == before
    top.unlink()
    top.with_name("aside").rename(top)
    ok(host.tpctl("uninstall"))
    assert not top.exists()


@pytest.mark.parametrize(("owner", "mode"), [(NOBODY, 0o755), (0, 0o777), (NOBODY, 0o700), (0, 0o775)])
def test_a_directory_of_somebody_else_becomes_roots_and_its_records_are_not_believed(
    host: Room, owner: int, mode: int
) -> None:
    before = host.rules()
    top = host.path("/run/tpctl")
    folder = top / host.key()
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format": 1, "options": {"iptables_mode": "nft"}}))
    for path in (folder / "state.json", folder, top):
        os.chown(path, owner, owner)
        path.chmod(mode)
    (top / f"{host.key()}.lock").touch()
    os.chown(top / f"{host.key()}.lock", NOBODY, NOBODY)
    ok(host.install())
    for path in (folder, top):
        assert (path.stat().st_mode & 0o7777, path.stat().st_uid) == (0o755, 0)
    assert "permission denied" in host.nobody(f"exec 9<> /run/tpctl/{host.key()}.lock").stderr.lower()
    ok(host.tpctl("uninstall"))
    assert host.rules() == before


HELD = """
import fcntl, os, sys
held = []
for path in sys.argv[1:]:
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        try:
            held.append(os.open(path, flags))
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            print("held", path)
        except OSError as error:
            pass
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_local_user_can_neither_write_nor_lock_nor_run_anything(host: Room, tmp_path: Path) -> None:
    ok(host.install())
    rules, record = host.rules(), (host.folder() / "state.json").read_text()
    lock = f"/run/tpctl/{host.key()}.lock"
    attempts = (
        "echo x > /run/tpctl/evil", "mkdir /run/tpctl/netns-evil", f"rm -f {lock}", f"flock --nonblock {lock} true",
        f"cat {lock}", f"mv /run/tpctl/{host.key()} /run/tpctl/other", f"echo x >> /run/tpctl/{host.key()}/state.json",
        f"ln -s /etc /run/tpctl/{host.key()}/.state-x", f"rm -r /run/tpctl/{host.key()}", "echo > /run/xtables.lock",
        "mkdir -p /run/tpctl-evil /var/cache/tpctl", "nft flush ruleset",
    )  # fmt: skip
    for script in attempts:
        assert host.nobody(script).returncode != 0, script
    holding = f"exec /usr/bin/python3 -c '{HELD}' /run/tpctl /run/tpctl/{host.key()} {lock}"
    held = host.nobody(f"({holding}) < /dev/null")
    assert "ready" in held.stdout
    assert f"held {lock}" not in held.stdout
    assert (host.rules(), (host.folder() / "state.json").read_text()) == (rules, record)
    ok(host.tpctl("uninstall"))


def test_holding_the_directory_locks_nobody_out(host: Room) -> None:
    ok(host.install())
    folder = f"/run/tpctl/{host.key()}"
    script = f"flock --nonblock /run/tpctl flock --nonblock {folder} /bin/sh -c 'echo got; sleep 60' & echo $!; wait"
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/bin/sh", "-c", script]
    argv = ["/usr/bin/nsenter", f"--target={host.holder}", "--mount", "--net", "--wd=/", *drop]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as holding:
        assert holding.stdout is not None
        try:
            said = {holding.stdout.readline().strip() for _ in range(2)}
            assert "got" in said
            ok(host.install("--exclude-inbound-ports", "22"))
            ok(host.tpctl("uninstall"))
        finally:
            os.killpg(holding.pid, 9)


def test_an_unprivileged_tpctl_changes_nothing(host: Room) -> None:
    ok(host.install())
    rules = host.rules()
    for words in (["install", "--kuma-dp-user", "nobody"], ["uninstall"], ["uninstall", "--flush", "--yes"],
                  ["apply"], ["confirm"], ["rollback"]):  # fmt: skip
        code = f"sys.argv = ['tpctl', *{words}]\nfrom tpctl.cli.main import main\nmain()\n"
        done = host.run(sys.executable, "-c", UNPRIVILEGED.format(uid=NOBODY) + code)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert "root" in done.stderr
    assert host.rules() == rules
    ok(host.tpctl("uninstall"))


# -- damaged -----------------------------------------------------------------------------------------------------------


def _changed(record: dict[str, Any], where: str, value: object) -> str:
    *way, last = where.split(".")
    inner = record
    for name in way:
        inner = inner[name]
    inner[last] = value
    return json.dumps(record)


DAMAGES: dict[str, Callable[[str], str | None]] = {
    "gone": lambda text: None,
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "nested": lambda text: "[" * 200_000,
    "no numbers": lambda text: _changed(json.loads(text), "policy.inbound.port", float("inf")),
    "no ports": lambda text: _changed(json.loads(text), "policy.outbound.port", 99_999),
    "no footprints": lambda text: _changed(json.loads(text), "footprints", {"iptables": [["hooks", [1, 2]]]}),
    "no hooks": lambda text: _changed(json.loads(text), "footprints.iptables", {"hooks": [1]}),
    "no options": lambda text: _changed(json.loads(text), "options.iptables_mode", ["nft"]),
    "another engine": lambda text: _changed(json.loads(text), "options.engine", "no such engine"),
    "rules in a name": lambda text: _changed(json.loads(text), "policy.loopback", 'lo" accept; flush ruleset; "'),
}


ENGINES = [("nftables",), ("iptables", "--iptables-mode", "nft"), ("iptables", "--iptables-mode", "legacy")]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine[-1])
def test_uninstall_cleans_whatever_has_become_of_the_record(host: Room, engine: tuple[str, ...]) -> None:
    for name in list(DAMAGES)[ENGINES.index(engine) :: len(ENGINES)]:
        ok(host.install("--engine", *engine))
        record = host.folder() / "state.json"
        text = json.loads(record.read_text())
        text["footprints"].setdefault("iptables", {})
        damaged = DAMAGES[name](json.dumps(text))
        record.unlink()
        if damaged is not None:
            record.write_text(damaged)
            record.with_name("pending.json").write_text(damaged)
        done = host.tpctl("status", "--json")
        assert done.returncode in (0, 2, 3), (name, done.stderr)
        assert "internal error" not in done.stderr, (name, done.stderr)
        done = host.tpctl("uninstall")
        assert (done.returncode, done.stderr) == (0, "") or done.stderr.startswith("notice"), (name, done.stderr)
        assert "tpctl" not in host.rules().lower(), name
        assert not host.path("/run/tpctl").exists(), name


@pytest.mark.needs("ebpf")
def test_uninstall_cleans_the_programs_of_a_damaged_record(ebpf_lab: Lab, ebpf_host: EbpfHost) -> None:
    with ebpf_lab.inside(HOST):
        done = ebpf_host.tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "ebpf")
        assert done.returncode == 0, done.stderr
        record = state.path()
        record.write_text(record.read_text()[:-100])
        assert ebpf_host.tpctl("uninstall").returncode == 0
        assert ebpf_host.status()["installed"] is False
    assert not Path(ebpf_host.folder, "pins", "tpctl").exists()

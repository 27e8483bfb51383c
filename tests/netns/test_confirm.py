"""--confirm-within: real commands, real guardians, real time, and what is left when the tool is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.kumactl_host import KUMA_RULES
from tests.netns.lab import PROXY, PROXY_USER, run, snapshot, tpctl
from tpctl.change import confirm
from tpctl.record import state
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, Layout
from tpctl.spec.policy import Policy

pytestmark = pytest.mark.root

INSTALL = ("install", "--kuma-dp-user", PROXY_USER)
SHORT = ("--confirm-within", "2s")
SOON_SECONDS = 20
"""Until something is over that is looked at before; on a busy machine a command takes seconds."""
LONG = ("--confirm-within", "600s")
PATIENCE_SECONDS = 120.0
ENGINES = {"nftables": ("--engine", "nftables"), "nft": ("--iptables-mode", "nft")}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(Layout()) as made:
        made.serve_data_plane(Policy(PROXY))
        yield made


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The flags of each engine in turn."""
    return ENGINES[str(request.param)]


def status() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(tpctl("status", "--json", check=False).stdout)
    return document


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def nothing_pending() -> bool:
    return not confirm.path().exists()


def guardians(token: str) -> list[int]:
    """The processes that stand guard over a change."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"rollback" in words and token.encode() in words:
            found.append(int(folder.name))
    return found


def let_the_time_pass() -> None:
    """End the guardian, and start one like it whose time is up: what would happen in ten minutes happens now."""
    pending = confirm.load()
    assert pending
    found = guardians(pending.token)
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    run([*confirm.guardian_argv(pending.token), "--wait", "0"])
    assert nothing_pending()


def test_a_change_that_nobody_confirms_is_taken_back(lab: Lab, engine: tuple[str, ...]) -> None:
    connection = lab.layout.arriving(ip_address("203.0.113.7"), next(iter(HOST_ADDRESS.values())), "tcp", 8080)
    lab.serve(connection)
    with lab.inside(HOST):
        before = snapshot(counters=False)
        done = tpctl(*INSTALL, *engine, "--confirm-within", f"{SOON_SECONDS}s")
        assert "tpctl confirm, within" in done.stdout
        found = status()
        assert found["installed"]
        assert found["problems"] == []
        assert found["pending"]["command"] == "install"
        assert 0 < found["pending"]["remainingSeconds"] <= SOON_SECONDS
        assert str(lab.dial(connection)) == "host:15006"
        until(lambda: not state.path().parent.exists())  # which goes last
        assert snapshot(counters=False) == before
        trace = status()["takenBack"]
        assert (trace["command"], trace["now"]) == ("install", "nothing")
        assert "taken back  the install, " in tpctl("status").stdout
        assert str(lab.dial(connection)) == "host:8080"


def test_what_is_told_of_a_rollback_ends_with_the_next_change(lab: Lab) -> None:
    with lab.inside(HOST):
        for then in ("install", "uninstall"):
            tpctl(*INSTALL, "--confirm-within", "1s")
            until(lambda: status()["takenBack"])
            tpctl(*(INSTALL if then == "install" else (then,)))
            assert status()["takenBack"] is None
            tpctl("uninstall")
        assert list(state.DIRECTORY.glob(f"{state.namespace_key()}*")) == []
        tpctl(*INSTALL, "--confirm-within", "600s")
        tpctl("rollback")  # who asks for it knows of it
        assert status()["takenBack"] is None


def test_a_confirmed_change_stays(lab: Lab, engine: tuple[str, ...]) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *engine, *LONG)
        pending = confirm.load()
        assert pending
        assert guardians(pending.token)
        assert "confirmed: the install stays" in tpctl("confirm").stdout
        after = snapshot(counters=False)
        until(lambda: not guardians(pending.token))
        assert snapshot(counters=False) == after
        assert status()["pending"] is None
        refused = tpctl("confirm", check=False)
        assert refused.returncode == 2
        assert "no change awaits confirmation" in refused.stderr
        tpctl("uninstall")


def test_the_previous_policy_comes_back(lab: Lab, engine: tuple[str, ...]) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *engine, "--exclude-inbound-ports", "22")
        before, record = snapshot(counters=False), state.load()
        other = ENGINES["nft" if "nftables" in engine else "nftables"]
        tpctl(*INSTALL, *other, "--ip-family-mode", "ipv4", *LONG)
        assert snapshot(counters=False) != before
        let_the_time_pass()
        assert status()["problems"] == []
        assert state.load() == record
        left = snapshot(counters=False)
        assert {name: left[name] for name in ("addresses", "iptables-nft-save")} == {
            name: before[name] for name in ("addresses", "iptables-nft-save")
        }
        tpctl("uninstall")


def test_an_uninstall_is_taken_back(lab: Lab, engine: tuple[str, ...]) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *engine)
        before, record = snapshot(counters=False), state.load()
        tpctl("uninstall", *LONG)
        assert not status()["installed"]
        let_the_time_pass()
        assert snapshot(counters=False) == before
        assert state.load() == record
        tpctl("uninstall")


def test_apply_is_taken_back_to_what_was_on_record(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *ENGINES["nft"])
        run(["iptables-nft", "-t", "nat", "-F", "PREROUTING"])
        assert "repaired" in tpctl("apply", *LONG).stdout
        let_the_time_pass()
        assert status()["problems"] == []
        tpctl("uninstall")


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_kumactl_comes_back(lab: Lab, variant: str) -> None:
    with lab.inside(HOST):
        run([f"iptables-{variant}-restore", "--noflush"], stdin=KUMA_RULES)
        before = run([f"iptables-{variant}-save", "-t", "nat"]).stdout.splitlines()
        tpctl(*INSTALL, *LONG)
        assert "KUMA_MESH" not in run([f"iptables-{variant}-save"]).stdout
        let_the_time_pass()
        after = run([f"iptables-{variant}-save", "-t", "nat"]).stdout.splitlines()
        assert [line for line in after if line[0] == "-"] == [line for line in before if line[0] == "-"]
        assert not status()["installed"]
        tpctl("uninstall")


@pytest.mark.parametrize("delay", [0.0, 0.15, 0.25, 0.35, 0.45, 0.6, 0.9])
def test_a_killed_install_is_taken_back(lab: Lab, engine: tuple[str, ...], delay: float) -> None:
    """Killed at any moment, with its terminal and all its session."""
    with lab.inside(HOST):
        before = snapshot(counters=False)
        argv = [sys.executable, "-m", "tpctl.cli.main", *INSTALL, *engine, *SHORT]
        process = subprocess.Popen(
            argv, cwd=ROOT_DIRECTORY, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until(nothing_pending)
        tpctl("status", check=False)
        assert snapshot(counters=False) == before
        assert state.load() is None


def test_an_interrupted_install_cannot_be_confirmed_but_rolled_back(lab: Lab) -> None:
    with lab.inside(HOST):
        before = snapshot(counters=False)
        tpctl(*INSTALL, *LONG)
        state.path().write_text(state.path().read_text().replace('"installed"', '"installing"'))
        refused = tpctl("confirm", check=False)
        assert refused.returncode == 2
        assert "tpctl rollback" in refused.stderr
        assert "taken back: the install; installed now: nothing" in tpctl("rollback").stdout
        assert snapshot(counters=False) == before
        assert tpctl("rollback", check=False).returncode == 2


def test_while_a_change_is_pending(lab: Lab) -> None:
    """An ordinary change is refused; one that has to be confirmed moves the deadline, the way back stays."""
    with lab.inside(HOST):
        before = snapshot(counters=False)
        tpctl(*INSTALL, *LONG)
        first = confirm.load()
        refused = tpctl(*INSTALL, "--exclude-inbound-ports", "80", check=False)
        assert refused.returncode == 2
        assert "awaits confirmation" in refused.stderr
        assert "unchanged" in tpctl(*INSTALL).stdout
        tpctl(*INSTALL, "--exclude-inbound-ports", "80", *LONG)
        second = confirm.load()
        assert first
        assert second
        assert second.before == first.before
        assert second.deadline > first.deadline
        until(lambda: not guardians(first.token))
        run([*confirm.guardian_argv(first.token), "--wait", "0"])
        assert status()["installed"], "the first deadline takes nothing back"
        tpctl("rollback")
        assert snapshot(counters=False) == before
        until(lambda: not guardians(second.token))


def test_a_refused_change_leaves_the_earlier_one_pending(lab: Lab, tmp_path: Path) -> None:
    broken = tmp_path / "restore"
    broken.write_text("#!/bin/sh\ncat >/dev/null\necho refused >&2\nexit 1\n")
    broken.chmod(0o755)
    tools = [f"{tool}{part}:/usr/sbin/{tool}{part}" for tool in ("iptables", "ip6tables") for part in ("", "-save")]
    tools += [f"{tool}-restore:{broken}" for tool in ("iptables", "ip6tables")]
    with lab.inside(HOST):
        before = snapshot(counters=False)
        tpctl(*INSTALL, *ENGINES["nft"], *LONG)
        pending = confirm.load()
        flags = ("--max-retries", "0", "--iptables-executables", ",".join(tools))
        assert tpctl(*INSTALL, *flags, *LONG, check=False).returncode != 0
        assert confirm.load() == pending
        let_the_time_pass()
        assert snapshot(counters=False) == before


def test_an_ordinary_uninstall_is_never_barred(lab: Lab) -> None:
    with lab.inside(HOST):
        before = snapshot(counters=False)
        tpctl(*INSTALL, *LONG)
        pending = confirm.load()
        assert pending
        tpctl("uninstall")
        assert nothing_pending()
        until(lambda: not guardians(pending.token))
        assert snapshot(counters=False) == before


def test_a_guardian_that_is_gone_is_a_problem(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *LONG)
        pending = confirm.load()
        assert pending
        for pid in guardians(pending.token):
            os.kill(pid, signal.SIGKILL)
        document = json.loads(confirm.path().read_text())
        confirm.path().write_text(json.dumps({**document, "deadline": document["deadline"] - 1000}))
        assert any("guardian is gone" in problem for problem in status()["problems"])
        tpctl("rollback")
        assert not status()["installed"]


def opened(process: Path) -> set[str]:
    """What a process has open, by its folder in /proc."""
    found = set()
    for one in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(one.readlink()))
    return found


def loaded(process: Path) -> set[str]:
    """The files whose code a process runs, by its folder in /proc."""
    maps = (line.split(maxsplit=5) for line in (process / "maps").read_text().splitlines())
    return {fields[5] for fields in maps if "x" in fields[1] and len(fields) > 5}


def test_a_guardian_owns_nothing_of_the_session(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl(*INSTALL, *LONG)
        pending = confirm.load()
        assert pending
        (pid,) = guardians(pending.token)
        folder = Path("/proc") / str(pid)
        session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
        assert session not in (os.getsid(0), pid)
        assert (folder / "cwd").readlink() == Path("/")
        assert (folder / "ns" / "net").readlink() == Path("/proc/thread-self/ns/net").readlink()
        # While it starts, it reads modules. A library may keep its own file open, as newer ones of libffi do.
        until(lambda: opened(folder) - loaded(folder) == {"/dev/null"})
        tpctl("uninstall")
        until(lambda: not guardians(pending.token))


@pytest.mark.parametrize("value", ["60", "0s", "500ms", "25h", "soon"])
def test_what_is_no_time(value: str) -> None:
    refused = tpctl(*INSTALL, "--confirm-within", value, check=False)
    assert refused.returncode == 2
    assert "confirm-within" in refused.stderr

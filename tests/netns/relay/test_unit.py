"""The relay's unit, and the drop-in of docs/relay.md for --accelerate sockmap, under a systemd of their own.

That runs as the first process of namespaces of its own, in a control group of its own. Nothing of the machine may be
changed by that. So it finds no unit but those of the test (the machine's would empty /tmp, for instance), the root file
system, /dev, /sys and /proc/sys are read-only for it (a first process raises fs.file-max, for instance), and /run, /tmp
and /var/tmp are its own.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hidden import CODE, ROOT_DIRECTORY, grasp, put
from tests.netns.relay import net as relay_net
from tests.netns.relay.accelerated import accelerated
from tests.netns.relay.net import PEER4, RELAY_UID, Net, process_status
from tests.netns.relay.test_listeners import serving
from tests.netns.relay.test_operation import scrape
from tpctl.host import cgroups
from tpctl.persist import systemd
from tpctl.relay.connections.sockmap import SINCE
from tpctl.system.errors import HostError

SYSTEMD = Path("/lib/systemd/systemd")
LONG = 60.0
pytestmark = [
    pytest.mark.root,
    pytest.mark.needs("cgroup"),
    pytest.mark.skipif(not SYSTEMD.exists(), reason="no systemd here"),
    pytest.mark.skipif(
        not ROOT_DIRECTORY.stat().st_mode & Path(__file__).stat().st_mode & 0o004,
        reason="the relay's user may not read this checkout",
    ),
]
UNITS = Path("/run/tests/units")
PLACES = [(number, code, Path(f"/run/tests/code{number}")) for number, code in enumerate(CODE, 7)]
"""Where the code is for it: the unit hides some places, and its user may not look into others."""
GRASP = "\n".join(grasp(number, code) for number, code, _ in PLACES)
PUT = "\n".join(put(number, place) for number, _, place in PLACES)
# A user namespace (PrivateUsers=) may only mount the /proc that it sees a whole one of: hence /run/host/proc.
START = f"""
set -e
{GRASP}
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind {{folder}}/passwd /etc/passwd
mount -t tmpfs tmpfs /run
cp -a {{folder}}/run/. /run
{PUT}
mkdir -p /run/host/proc
mount -t proc proc /run/host/proc
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/tmp
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o remount,bind,ro /sys
mount -o remount,bind,ro /dev
mount -o remount,bind,ro /
export container=tests SYSTEMD_UNIT_PATH={{units}} SYSTEMD_GENERATOR_PATH=/nonexistent
exec {SYSTEMD} --unit=tests.target --log-target=console --show-status=no
"""
OPTIONS = "--metrics 127.0.0.1:9902 --log-format json"
MAIN = f"""[Service]
Environment="TPCTL_RELAY_OPTIONS={OPTIONS}"
StandardError=append:/run/relay.log
"""
needs_sockmap = pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < SINCE, reason="this kernel is too old for sockmap"
)
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def seen(path: Path) -> str:
    """Where it finds a file of the code."""
    return next(str(place / path.relative_to(code)) for _, code, place in PLACES if path.is_relative_to(code))


def drop_in() -> str:
    """The drop-in, as docs/relay.md has it."""
    text = (ROOT_DIRECTORY / "docs/relay.md").read_text()
    return text.partition("tpctl-relay.service.d/sockmap.conf\n")[2].partition("```")[0]


class Machine:
    """A systemd whose only service is the relay's, or another data plane's."""

    def __init__(self, folder: Path, net: Net, drop_ins: dict[str, str], unit: str = systemd.RELAY) -> None:
        self._folder = folder
        self._unit = unit
        self._cgroup = cgroups.root() / f"tpctl-unit-{os.getpid()}"
        units = folder / UNITS.relative_to("/")
        (units / f"{unit}.d").mkdir(parents=True)
        for name in ("tests", "sysinit", "basic", "shutdown"):
            (units / f"{name}.target").write_text("[Unit]\nDescription=nothing to start\nDefaultDependencies=no\n")
        (units / unit).write_text(systemd.unit_text(unit, "/run/tpctl"))
        for name, text in drop_ins.items():
            text = text.replace(systemd.SHIPPED_COMMAND, "/run/tpctl")
            (units / f"{unit}.d" / name).write_text(text)
        command = folder / "run/tpctl"
        python, source = seen(Path(sys.executable)), seen(ROOT_DIRECTORY / "agent")
        command.write_text(f'#!/bin/sh\nPYTHONPATH={source} exec {python} -m tpctl.cli.main "$@"\n')
        command.chmod(0o755)
        users = Path("/etc/passwd").read_text()
        (folder / "passwd").write_text(f"kuma-dp:x:{RELAY_UID}:{pwd.getpwuid(RELAY_UID).pw_gid}::/:/bin/false\n{users}")
        self._cgroup.mkdir()
        script = f"echo $$ >{self._cgroup}/cgroup.procs && exec unshare -m -p -f -u -i -C --propagation private sh -c "
        inner = START.format(folder=folder, units=UNITS)
        argv = ["nsenter", f"--net=/run/netns/{net.host}", "sh", "-ec", script + '"$0"', inner]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def log(self) -> str:
        """What systemd and the relay have said."""
        inside = Path(f"/proc/{self._first()}/root/run/relay.log")
        return (self._folder / "log").read_text() + (inside.read_text() if inside.exists() else "")

    def is_up(self) -> bool:
        """Whether it can be asked to start something, within a time."""
        end = time.monotonic() + LONG
        while time.monotonic() < end and self._process.poll() is None:
            if self._first() and self.systemctl("is-active", "tests.target").stdout == "active\n":
                found = self.systemctl("list-unit-files", "--no-legend", "--no-pager").stdout
                names = {line.split()[0] for line in found.splitlines()}
                assert names <= {path.name for path in (self._folder / UNITS.relative_to("/")).iterdir()}, names
                return True
            time.sleep(0.1)
        return False

    def systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Ask it for something."""
        argv = ["nsenter", "-t", str(self._first()), "-m", "-p", "-C", "systemctl", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=LONG, check=False)

    def start(self, verb: str = "start") -> int:
        """Have the service started; its process, as it is called outside."""
        done = self.systemctl(verb, self._unit)
        assert done.returncode == 0, done.stderr + self.log()
        inside = self.systemctl("show", "-P", "MainPID", self._unit).stdout.strip()
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the one that has sent the signal
                if process_status(pid)["NSpid"].split()[-1] == inside:
                    return pid
        raise AssertionError(self.log())

    def processes(self) -> list[int]:
        """Those of the service, as they are called outside."""
        return [int(pid) for pid in (self._cgroup / "system.slice" / self._unit / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """End everything in it."""
        if first := self._first():
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, 9)
        self._process.kill()
        self._process.wait()
        end = time.monotonic() + LONG
        while self._cgroup.exists():
            for place in sorted(self._cgroup.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    place.rmdir()
            try:
                self._cgroup.rmdir()
            except OSError:
                assert time.monotonic() < end, "its processes have not ended"
                time.sleep(0.05)

    def _first(self) -> int:
        """The process that is number 1 inside; 0 before there is one."""
        with contextlib.suppress(OSError, IndexError):
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            if process_status(int(children[0]))["Name"] == "systemd":
                return int(children[0])
        return 0


@contextlib.contextmanager
def machine(folder: Path, net: Net, unit: str = systemd.RELAY, **drop_ins: str) -> Iterator[Machine]:
    """One that is up."""
    try:
        made = Machine(folder, net, {f"{name}.conf": text for name, text in drop_ins.items()}, unit)
    except HostError as error:
        pytest.skip(str(error))
    try:
        if not made.is_up():
            pytest.skip(f"systemd does not run in namespaces here: {made.log()[-500:]}")
        yield made
    finally:
        made.remove()


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network() as made:
        yield made


def assert_confined(pid: int) -> None:
    found = process_status(pid)
    assert set(found["Uid"].split()) == {str(RELAY_UID)}
    assert {name: int(found[name], 16) for name in CAPABILITIES} == dict.fromkeys(CAPABILITIES, 0)
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def test_the_unit(net: Net, tmp_path: Path) -> None:
    with machine(tmp_path, net, main=MAIN) as made:
        for verb in ("start", "restart", "reload"):
            assert_confined(made.start(verb))
            with (
                serving(net, net.peer, (PEER4, 9000), relay_net.echo),
                net.connect(net.host, (PEER4, 9000)) as client,
            ):
                client.sendall(b"hello")
                assert client.recv(5) == b"hello"


@needs_sockmap
def test_the_unit_as_it_is_does_not_allow_sockmap(net: Net, tmp_path: Path) -> None:
    pytest.importorskip("bcc")
    more = MAIN.replace(OPTIONS, f"{OPTIONS} --accelerate sockmap")
    with machine(tmp_path, net, main=more) as made:
        assert made.systemctl("start", systemd.RELAY).returncode != 0
        assert "it needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN" in made.log()


@needs_sockmap
def test_the_drop_in_allows_sockmap_and_nothing_of_it_stays(net: Net, tmp_path: Path) -> None:
    pytest.importorskip("bcc")
    with machine(tmp_path, net, main=MAIN, sockmap=drop_in()) as made:
        for verb in ("start", "restart"):
            assert_confined(made.start(verb))
            with accelerated(net) as pair:
                pair.talk(100)
            assert scrape(net, 9902)['accelerated_streams_total{step="begun"}'] == 2

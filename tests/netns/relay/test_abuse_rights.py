"""What the relay keeps of root's rights, and what others of its user can do to it: nothing that is not needed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hidden import anybodys_python
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, PEER4, RELAY_UID, Net, Relay, process_status
from tests.netns.relay.test_listeners import serving

pytestmark = pytest.mark.root
BIND_SERVICE, RAW = 1 << 10, 1 << 13
LISTENER = '{{listen: "{listen}", direction: {direction}, upstream: "{peer}:7000", name: x{number}}}'
ATTACH = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pid = int(sys.argv[1])
attached = libc.ptrace(16, pid, 0, 0)  # PTRACE_ATTACH
try:
    open(f"/proc/{pid}/mem", "rb")
    read = True
except OSError:
    read = False
print(attached == 0, read)
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        yield made


def configuration(directory: Path, *listens: str, direction: str = "outbound") -> str:
    described = (
        LISTENER.format(listen=one, direction=direction, peer=PEER4, number=at) for at, one in enumerate(listens)
    )
    listeners = ", ".join(described)
    path = directory / "relay.yaml"
    path.write_text(f"listeners: [{listeners}]\n")
    return str(path)


def is_confined(pid: int, capabilities: int) -> None:
    """An ordinary user, alone in its groups, with these capabilities, which no program can add to."""
    shown = process_status(pid)
    assert shown["Uid"].split() == [str(RELAY_UID)] * 4
    assert len(set(shown["Gid"].split())) == 1
    assert shown["Groups"].split() in ([], shown["Gid"].split()[:1])
    of_root = {name: int(shown[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
    assert of_root == dict.fromkeys(of_root, capabilities)
    assert shown["NoNewPrivs"] == "1"
    assert int(shown["Umask"], 8) & 0o007 == 0o007
    assert Path(f"/proc/{pid}/maps").stat().st_uid == 0, "dumpable: it belongs to its user"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("direction", "listens", "capabilities"),
    [
        ("inbound", ["*:1101"], 0),
        ("inbound", ["*:1101", "*:81"], BIND_SERVICE),
        ("outbound", ["*:1101"], BIND_SERVICE),  # for clients of this host that have a privileged port
        ("outbound", ["*:1101 transparent"], BIND_SERVICE | RAW),
    ],
)
def test_it_keeps_what_its_listeners_need_and_nothing_else(
    net: Net, directory: Path, workers: int, direction: str, listens: list[str], capabilities: int
) -> None:
    # Root of a container or of a sloppy script: groups, inheritable capabilities and a umask that should not last.
    inherited = ("setpriv", "--groups=0,4,27", "--inh-caps=+net_raw,+sys_admin", "sh", "-c", 'umask 0; exec "$@"', "sh")
    options = ("--config", configuration(directory, *listens, direction=direction), "--workers", str(workers))
    with relay_net.relay(net, directory, *options, prefix=inherited) as running:
        for pid in (running.process.pid, *running.workers()):
            is_confined(pid, capabilities)


def test_it_keeps_that_when_it_is_restarted(net: Net, directory: Path) -> None:
    """The successor is a program that the relay executes, as its user."""
    with (
        serving(net, net.peer, (PEER4, 7000), relay_net.say_who("server")),
        relay_net.relay(net, directory, "--config", configuration(directory, "*:1101", "*:81")) as running,
    ):
        running.process.send_signal(signal.SIGUSR2)
        successor = running.wait_for("handed over")["successor"]
        try:
            is_confined(successor, BIND_SERVICE)
            with net.connect(net.peer, (HOST4, 81)) as client:
                assert json.loads(relay_net.read_all(client))[0] == "server"
        finally:
            os.kill(successor, signal.SIGTERM)
            relay_net.until(lambda: not relay_net.is_running(successor))


def attach(pid: int) -> str:
    """Whether a process of the relay's user may attach to another one, and read its memory."""
    argv = [
        "setpriv",
        f"--reuid={RELAY_UID}",
        "--regid=65534",
        "--clear-groups",
        anybodys_python()[0],
        "-c",
        ATTACH,
        str(pid),
    ]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout.strip()


@pytest.mark.needs("ptrace")
def test_another_process_of_its_user_cannot_look_into_it(net: Net, directory: Path) -> None:
    with subprocess.Popen(
        ["setpriv", f"--reuid={RELAY_UID}", "--regid=65534", "--clear-groups", "sleep", "600"]
    ) as ordinary:
        try:
            relay_net.until(lambda: process_status(ordinary.pid)["Name"] == "sleep")
            ptrace_scope = Path("/proc/sys/kernel/yama/ptrace_scope")
            restricted = ptrace_scope.exists() and ptrace_scope.read_text().strip() != "0"
            assert attach(ordinary.pid) == f"{not restricted} {not restricted}", "the test could not tell"
        finally:
            ordinary.kill()
    with relay_net.relay(net, directory, "--config", configuration(directory, "*:1101")) as running:
        assert attach(running.process.pid) == "False False"


@pytest.mark.needs("ptrace")
def test_neither_can_one_where_it_was_started_as_its_user(net: Net, directory: Path) -> None:
    """As systemd does: then the kernel has not made it undumpable by itself."""
    started = ("setpriv", f"--reuid={RELAY_UID}", "--regid=65534", "--clear-groups")
    text = configuration(directory, "*:1101")
    with relay_net.relay(net, directory, "--config", text, user=None, prefix=started) as running:
        assert process_status(running.process.pid)["NoNewPrivs"] == "1"
        assert attach(running.process.pid) == "False False"


def test_its_unix_sockets_are_not_for_everybody(net: Net, directory: Path) -> None:
    directory.chmod(0o777)
    path = directory / "metrics.sock"
    sloppy = ("sh", "-c", 'umask 0; exec "$@"', "sh")
    with relay_net.relay(net, directory, "--metrics", f"unix:{path}", prefix=sloppy):
        assert path.stat().st_mode & 0o007 == 0
        stranger = subprocess.run(
            ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", anybodys_python()[0], "-c",
             f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "PermissionError" in stranger.stderr
        with socket.socket(socket.AF_UNIX) as root:
            root.settimeout(relay_net.TIMEOUT)
            root.connect(str(path))
            root.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert re.match(rb"HTTP/1\.1 200", relay_net.read_all(root))


def test_a_user_that_is_not_root_becomes_nobody_else(net: Net, directory: Path) -> None:
    started = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups")
    running = Relay(net, directory, "--config", configuration(directory, "*:1101"), prefix=started)
    assert running.exit_code() == 2
    assert "only root may become another user" in running.log_text()

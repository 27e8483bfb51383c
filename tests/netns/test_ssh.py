"""A real sshd, real sessions from another host, and an operator who forgot everything."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import pytest

from tests.hidden import ROOT_DIRECTORY, hide
from tests.netns.lab import PROXY_USER
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, Layout
from tpctl.spec.policy import Family

pytestmark = [pytest.mark.root, pytest.mark.skipif(not shutil.which("sshd"), reason="no sshd here")]

HERE = f"cd {quote(str(ROOT_DIRECTORY))}"
TPCTL = f"{quote(sys.executable)} -m tpctl.cli.main"
INSTALL = f"{TPCTL} install --kuma-dp-user {PROXY_USER}"
UNINSTALL = f"{TPCTL} uninstall"
STATUS = f"{TPCTL} status --json"
AS_SUDO = "env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin"
PATIENCE_SECONDS = 120.0
CONFIGURATION = """\
Port 22
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
SERVER = f'set -e; mount --make-rprivate /\n{hide("/run")}\nmkdir /run/sshd; exec /usr/sbin/sshd -D -e -f "$1"'


class Session:
    """An interactive session that answers what it is sent."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def is_alive(self) -> bool:
        """Whether a line comes back."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("still here\n")
        self.process.stdin.flush()
        return self.process.stdout.readline() == "still here\n"


class Server:
    """The host's sshd, and another host that calls it."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.client = [
            "ssh", "-i", str(folder / "key"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60", "-o", "BatchMode=yes",
            f"root@{HOST_ADDRESS[Family.IPV4]}",
        ]  # fmt: skip

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """A session of its own for one command."""
        with self.lab.inside(PEER):
            words = [*self.client, f"{HERE} && {command}"]
            return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)

    def answers(self) -> bool:
        """Whether a new session can be opened."""
        return self.run("true").returncode == 0

    def status(self) -> dict[str, Any]:
        """What tpctl says, by a new session."""
        found: dict[str, Any] = json.loads(self.run(STATUS).stdout)
        return found

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """A session that stays open."""
        with self.lab.inside(PEER):
            process = subprocess.Popen(
                [*self.client, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True,
            )  # fmt: skip
        with process:
            yield Session(process)
            process.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "sshd_config").write_text(CONFIGURATION.format(folder=tmp_path))
    with Lab(Layout()) as lab:
        with lab.inside(HOST), (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", SERVER, "sh", str(tmp_path / "sshd_config")],
                stderr=log,
            )  # fmt: skip
        try:
            made = Server(lab, tmp_path)
            until(made.answers, (tmp_path / "log").read_text)
            yield made
        finally:
            process.kill()
            process.wait()


def until(happened: Any, complaint: Any = str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.2)


@pytest.mark.parametrize("engine", ["nftables", "iptables"])
@pytest.mark.parametrize("prefix", ["", AS_SUDO])
def test_with_no_exclusion_and_no_data_plane_the_operator_stays_in(server: Server, engine: str, prefix: str) -> None:
    with server.session() as idle:
        assert idle.is_alive()
        done = server.run(f"{prefix} {INSTALL} --engine {engine}")
        assert done.returncode == 0, done.stderr
        assert "this ssh session uses port 22" in done.stderr
        assert "nothing listens on tcp port 15006" in done.stderr
        assert idle.is_alive()
        assert server.answers()
        found = server.status()
        assert found["policy"]["inbound"]["excludePorts"] == ["22"]
        assert any("nothing listens" in problem for problem in found["problems"])
        assert server.run(UNINSTALL).returncode == 0
        assert idle.is_alive()
        assert server.answers()


def test_locked_out_and_let_in_again(server: Server) -> None:
    """The guard declined, no data plane, and the session cut: the host takes the change back."""
    with server.session() as idle:
        words = [
            *server.client,
            f"{HERE} && {INSTALL} --no-ssh-guard --confirm-within 20s && sleep 100",
        ]
        with server.lab.inside(PEER):
            cut = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        with cut:
            assert cut.stdout
            until(lambda: "remove it" in cut.stdout.readline() if cut.stdout else False)
            cut.kill()
        assert not server.answers()
        assert idle.is_alive()
        until(server.answers)
        assert idle.is_alive()
        assert not server.status()["installed"]

"""Real firewalls in a laboratory's host, each with a configuration of its own and a /run of its own."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.hidden import ROOT_DIRECTORY, hide
from tests.netns.lab import run
from tpctl.rehearsal.namespaces import Namespace

_UFW = f"""
mount --make-rprivate /
{hide("/run")}
mount --bind "$1/ufw" /etc/ufw; mount --bind "$1/default" /etc/default/ufw
shift; exec ufw "$@"
"""


class Ufw:
    """The ufw of the distribution. Its rules go with the network namespace."""

    def __init__(self, directory: Path, space: Namespace) -> None:
        self.directory = directory
        self.space = space
        run(["cp", "-a", "/etc/ufw", str(directory / "ufw")])
        run(["cp", "-a", "/etc/default/ufw", str(directory / "default")])

    def run(self, command: str) -> None:
        """Carry out a command line that begins with ufw."""
        program, *words = command.split()
        assert program == "ufw"
        argv = ["unshare", "--mount", "sh", "-ec", _UFW, "sh", str(self.directory), *words]
        with self.space.inside():
            done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT_DIRECTORY)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


_FAIL2BAN = f"""
mount --make-rprivate /
{hide("/run")}
exec fail2ban-server -f -x -c "$1" -s "$1/socket" -p "$1/pid" start
"""
_SERVER = "[Definition]\ndbfile = None\nlogtarget = {0}/log\nsocket = {0}/socket\npidfile = {0}/pid\n"
_JAIL = """[DEFAULT]
banaction = {action}
[app]
enabled = true
filter = sshd
backend = polling
logpath = {directory}/app.log
port = 8080
"""
_START_SECONDS = 120.0


@contextlib.contextmanager
def fail2ban(directory: Path, space: Namespace, action: str) -> Iterator[Path]:
    """A real fail2ban with one jail, "app", for port 8080; hands back its socket, for fail2ban-client."""
    run(["sh", "-c", f"cp -a /etc/fail2ban/. {directory} && rm -f {directory}/jail.d/*"])
    (directory / "fail2ban.local").write_text(_SERVER.format(directory))
    (directory / "jail.local").write_text(_JAIL.format(action=action, directory=directory))
    (directory / "app.log").touch()
    with space.inside(), (directory / "said").open("w") as said:
        server = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", _FAIL2BAN, "sh", str(directory)],
            stdout=said, stderr=subprocess.STDOUT, cwd=ROOT_DIRECTORY,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + _START_SECONDS
        while run(["fail2ban-client", "-s", str(directory / "socket"), "status", "app"], check=False).returncode:
            assert server.poll() is None, (directory / "said").read_text()
            assert time.monotonic() < deadline, (directory / "said").read_text()
            time.sleep(0.1)
        yield directory / "socket"
    finally:
        server.terminate()
        server.wait()

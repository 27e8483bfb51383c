"""A real firewalld in a network namespace: its own D-Bus, its own configuration, and no other's rules within reach."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.hidden import ROOT_DIRECTORY, hide
from tests.netns.relay.net import is_running
from tpctl.rehearsal.namespaces import Namespace

START_SECONDS = 120.0
DAEMONS = f"""
mount --make-rprivate /
{hide("/run")}
mkdir /run/dbus
mount --bind "$1" /etc/firewalld
dbus-daemon --system --nofork --nopidfile > "$1/bus.log" 2>&1 & echo $! > "$1/pids"
for i in $(seq 1200); do test -S /run/dbus/system_bus_socket && break; sleep 0.05; done
firewalld --nofork --nopid --log-target console > "$1/log" 2>&1 & echo $! >> "$1/pids"
echo ready
exec sleep infinity
"""


class Firewall:
    """Runs commands beside the daemons, in their mount and network namespaces."""

    def __init__(self, holder: int, configuration: Path, space: Namespace) -> None:
        self.holder = holder
        self.configuration = configuration
        self.space = space

    def run(self, argv: Sequence[str], *, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program there."""
        words = ["nsenter", f"--target={self.holder}", "--mount", "--net", f"--wd={ROOT_DIRECTORY}", *argv]
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{list(argv)} exited with {done.returncode}:\n{done.stdout}{done.stderr}\n{self.log}")
        return done

    def tpctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the real command there."""
        return self.run([sys.executable, "-m", "tpctl.cli.main", *arguments], check=check)

    @property
    def log(self) -> str:
        """What firewalld has said."""
        return (self.configuration / "log").read_text(errors="replace")

    @property
    def direct(self) -> Path:
        """Its direct.xml, seen from outside."""
        return self.configuration / "direct.xml"

    def restart(self) -> None:
        """Stop firewalld as systemd does, and start it again."""
        bus, old = (int(word) for word in (self.configuration / "pids").read_text().split())
        os.kill(old, signal.SIGTERM)
        _until(lambda: not is_running(old), "firewalld did not end")
        script = 'firewalld --nofork --nopid --log-target console >> "$1/log" 2>&1 & echo $! > "$1/new"'
        self.run(["sh", "-c", script, "sh", str(self.configuration)])
        new = (self.configuration / "new").read_text().strip()
        (self.configuration / "pids").write_text(f"{bus}\n{new}\n")
        self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        _until(lambda: self.run(["firewall-cmd", "--state"], check=False).returncode == 0, "firewalld does not answer")


@contextlib.contextmanager
def firewall(configuration: Path, backend: str, space: Namespace) -> Iterator[Firewall]:
    """A firewalld of one backend ("nftables" or "iptables") in a network namespace, gone at the end."""
    settings = Path("/etc/firewalld/firewalld.conf").read_text()
    lines = [
        f"FirewallBackend={backend}" if one.startswith("FirewallBackend=") else one for one in settings.split("\n")
    ]
    (configuration / "firewalld.conf").write_text("\n".join(lines))
    for name in ("zones", "policies", "services", "ipsets", "icmptypes", "helpers"):
        (configuration / name).mkdir(exist_ok=True)
    with space.inside():
        holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", DAEMONS, "sh", str(configuration)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        assert holder.stdout
        assert holder.stdout.readline().strip() == "ready"
        made = Firewall(holder.pid, configuration, space)
        made.wait()
        yield made
    finally:
        pids = configuration / "pids"
        for pid in pids.read_text().split() if pids.exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        holder.kill()
        holder.wait()
        if holder.stdout:
            holder.stdout.close()


def _until(happened: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not happened():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.1)

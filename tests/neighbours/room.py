"""A host for real software: the network namespace of a laboratory's host, with files and processes of its own.

What is started there ends with the room, and what it writes in /etc, /run and /var goes with it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.hidden import ROOT_DIRECTORY, hide
from tests.netns.lab import run
from tpctl.rehearsal.namespaces import Namespace

GROUP = "TPCTL_GROUP"
"""Names the variable with a control group for what starts containers."""
_FIRST = f"""
mount --make-rprivate /
cp -a /etc "$1/etc"
{hide("/run")}
{hide("/var/lib")}
{hide("/var/log")}
mkdir -p /run/lock /run/netns /run/dbus
mount --bind "$1/etc" /etc
for tool in iptables ip6tables; do
    for end in "" -save -restore; do ln -sf /usr/sbin/$tool-"$2"$end /etc/alternatives/$tool$end; done
done
mount -t proc proc /proc
echo ready
trap "" HUP INT TERM
while :; do sleep 1000 & wait; done  # as process 1 it also waits for those whose parents have gone
"""
_LIBRARY = r"""
set -e
log=/run/neighbour.log
begin() { name=$1; shift; setsid "$@" >>$log 2>&1 </dev/null & echo $! >/run/$name.begun; }
await() { for i in $(seq 600); do "$@" >/run/awaited 2>&1 && return 0; sleep 0.1; done; cat /run/awaited $log; false; }
gone() { test ! -e /proc/$1; }
end() { pid=$(cat /run/$1.begun); kill $pid; await gone $pid; }
"""


_DNS = """
import selectors, socket, sys
ready = selectors.DefaultSelector()
for family, wildcard in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    made = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6: made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind((wildcard, int(sys.argv[1])))
    ready.register(made, selectors.EVENT_READ)
while True:
    for key, _ in ready.select():
        query, client = key.fileobj.recvfrom(512)
        key.fileobj.sendto(query[:2] + bytes([query[2] | 128]) + query[3:], client)
"""
"""A name server that sends each message back as a response (RFC 1035, 4.1.1: QR)."""


class Room:
    """Runs programs in it. Use `room` to make one."""

    def __init__(self, holder: int, group: str) -> None:
        self._holder = holder
        self._environment = {**os.environ, GROUP: group}

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program there."""
        words = ["nsenter", f"--target={self._holder}", "--mount", "--net", "--pid", "--uts",
                 f"--wd={ROOT_DIRECTORY}", *argv]  # fmt: skip
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=self._environment
        )
        if check and done.returncode:
            raise AssertionError(f"{argv[-1]} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def script(self, text: str) -> str:
        """Run a shell script that stops at the first error, with begin, await and end for daemons; its output."""
        return self.run("bash", "-c", f"{_LIBRARY}\n{text}").stdout

    def serve_dns(self, uid: int, port: int) -> None:
        """Answer every query that gets to a port, of either family, as a user, until the room is left."""
        self.script(f"begin dns setpriv --reuid={uid} --clear-groups /usr/bin/python3 -I -c '{_DNS}' {port}\n"
                    f"await sh -c 'test $(ss -Hlun sport = :{port} | wc -l) = 2'")  # fmt: skip

    def tpctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the real command there."""
        return self.run(sys.executable, "-m", "tpctl.cli.main", *arguments, check=check)


@contextlib.contextmanager
def room(directory: Path, space: Namespace, variant: str) -> Iterator[Room]:
    """A room whose `iptables` is of a variant, "nft" or "legacy"; everything in it has ended afterwards."""
    group = f"tpctl-neighbours-{uuid.uuid4().hex}"
    argv = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "bash", "-ec", _FIRST, "bash",
            str(directory), variant]  # fmt: skip
    with space.inside():
        outer = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert outer.stdout
        assert outer.stdout.readline().strip() == "ready"
        holder = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0]
        yield Room(int(holder), group)
    finally:
        outer.kill()
        outer.wait()
        if outer.stdout:
            outer.stdout.close()
        _remove_groups(group)


def _remove_groups(group: str) -> None:
    """Of whichever hierarchies containers were put into; they are empty once the room's processes have gone."""
    # Other tests make and remove groups meanwhile, which os.walk does not mind.
    for top in [Path(place, group) for place, groups, _ in os.walk("/sys/fs/cgroup") if group in groups]:
        run(["timeout", "60", "sh", "-c", 'until find "$1" -depth -type d -exec rmdir {} + 2>/dev/null; do '
             'test -d "$1" || exit 0; sleep 0.1; done', "sh", str(top)])  # fmt: skip

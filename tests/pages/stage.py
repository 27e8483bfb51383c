"""A host on which a page is played, and another machine: made of namespaces, gone with this process.

    unshare ... python -m tests.pages.stage PAGE      prints a JSON list of what each command printed

It has its own processes, network, /etc, /run, /srv, /mnt, /var/lib/tpctl: what is written elsewhere stays there.
The host has the addresses 10.0.0.5 and fd00::5, the users kuma-dp (uid 5678) and app (uid 1000), and a route to the
client, 10.0.0.9 and fd00::9, which answers for example.com too, at 203.0.113.10. The client's files are the host's: ssh
and scp stay here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.hidden import ROOT_DIRECTORY, hide
from tests.pages.script import ROOT, Step, steps
from tpctl.rehearsal.cgroup import own_groups, remove
from tpctl.system.errors import HostError

PATIENCE_SECONDS = 300.0
_SEARCHED = f"{sysconfig.get_path('scripts')}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_END = "that was its output:"
_DONE = re.compile(rf"\n{_END} (\d+)\n".encode())
# The shell is process 1 there: it takes in what has ended in the background.
APART = (
    *("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"),
    *("bash", "-c", '"$@"; exit $?', "-"),
)
_HERE = Path("/run/here")
_SYSTEMD = Path("/lib/systemd/systemd")
_OWN_CGROUP = "--own-cgroup"
_SETTING = r"""
mkdir -p /run/tpctl-etc && mount -t tmpfs -o mode=755 none /run/tpctl-etc
cp -a /etc/. /run/tpctl-etc && mount --rbind /run/tpctl-etc /etc
mount -t tmpfs -o mode=755 none /run && mkdir -p /run/here /run/netns /run/lock /run/bin
cat >/run/bin/ssh <<'END'
#!/bin/bash
shift; exec "$@"
END
cat >/run/bin/scp <<'END'
#!/bin/bash
[ "$1" != -q ] || shift
cp "${@/#*:/}"
END
cat >/run/bin/boot <<'END'
#!/bin/bash
# boot NAME COMMAND: systemd, as process 1 of a namespace below this one, with one service.
umount --recursive /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
units=/etc/systemd/system
rm -rf $units && mkdir -p $units
printf '[Unit]\nDefaultDependencies=no\nWants=%s.service\n' "$1" >$units/stage.target
printf '[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=%s\n' "$2" >$units/$1.service
container=other setsid unshare --pid --fork --mount-proc --kill-child /lib/systemd/systemd --unit=stage.target \
    >/run/systemd.log 2>&1 &
until systemctl is-active --quiet "$1"; do sleep 0.1; done
END
cat >/run/bin/systemctl <<'END'
#!/bin/bash
# It hears nobody from another namespace of processes.
exec nsenter --target "$(pgrep -x systemd)" --pid --mount /usr/bin/systemctl "$@"
END
chmod +x /run/bin/*
for folder in /var/lib/tpctl /var/cache/tpctl; do
    if [ -d $folder ]; then mount -t tmpfs -o mode=755 none $folder; fi
done
rm -rf /etc/tpctl
sed -i -E '/^(kuma-dp|app):|:(5678|1000):/d' /etc/passwd
sed -i -E '/^(kuma-dp|app):|:(5678|1000):/d' /etc/group
echo 'kuma-dp:x:5678:5678::/nonexistent:/usr/sbin/nologin' >>/etc/passwd
echo 'kuma-dp:x:5678:' >>/etc/group
echo 'app:x:1000:1000::/:/bin/sh' >>/etc/passwd
echo 'nameserver 10.0.0.53' >/run/resolv.conf
rm -f /etc/resolv.conf && cp /run/resolv.conf /etc/resolv.conf
printf '127.0.0.1 localhost\n203.0.113.10 example.com\n' >/etc/hosts
ip link set lo up
ip netns add client
ip link add eth0 type veth peer name eth0 netns client
ip address add 10.0.0.5/24 dev eth0
ip -6 address add fd00::5/64 dev eth0 nodad
ip link set eth0 up
ip -n client link set lo up
ip -n client address add 10.0.0.9/24 dev eth0
ip -n client address add 203.0.113.10/32 dev lo
ip -n client -6 address add fd00::9/64 dev eth0 nodad
ip -n client link set eth0 up
ip route add default via 10.0.0.9
ip -6 route add default via fd00::9
echo '<h1>Example Domain</h1>' >/run/index.html
cd /run && ip netns exec client python3 -m http.server 80 --bind 203.0.113.10 --directory /run >/dev/null 2>&1 &
until curl --silent --output /dev/null http://example.com; do sleep 0.1; done
"""


class Terminal:
    """A shell, to which commands are typed one after the other."""

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        self._shell = subprocess.Popen(
            [*words, "bash", "--norc"], cwd=_HERE, env=environment, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._write("shopt -s expand_aliases\n")

    def type(self, command: str) -> tuple[int, str]:
        """Type a command; its exit code, and what it printed. Raises SystemExit if it takes too long."""
        # What goes on in the background is not the shell's job: it would tell of its end.
        self._write(f"{{ {command}\n}} </dev/null; code=$?; disown -a; printf '\\n{_END} %d\\n' $code; (exit $code)\n")
        printed = b""
        end = time.monotonic() + PATIENCE_SECONDS
        while not (done := _DONE.search(printed)):
            printed += self._read(end) or self._given_up(command, printed)
        return int(done[1]), printed[: done.start()].decode(errors="replace").replace("\r\n", "\n")

    def _write(self, text: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(text.encode())

    def _read(self, end: float) -> bytes:
        """What comes until a moment; nothing when nothing does. A process in the background may hold the pipe open."""
        assert self._shell.stdout is not None
        ready, _, _ = select.select([self._shell.stdout], [], [], max(end - time.monotonic(), 0))
        return os.read(self._shell.stdout.fileno(), 65536) if ready else b""

    def _given_up(self, command: str, printed: bytes) -> bytes:
        raise SystemExit(f"{command}: not done in {PATIENCE_SECONDS:.0f} s\n{printed.decode(errors='replace')}")


def play(page: str) -> list[str]:
    """Run the commands of a page here; what each printed."""
    setting = "\n".join(["set -e; mount --make-rprivate /", hide("/srv"), hide("/mnt"), _SETTING])
    subprocess.run(["bash", "-c", setting], check=True, timeout=PATIENCE_SECONDS, stdout=2)
    environment = {
        "PATH": f"/run/bin:{_SEARCHED}",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "100",
    }
    terminals: dict[str, Terminal] = {}
    printed = []
    for step in steps(page):
        if step.needs and not is_here(step.needs):
            printed.append(step.said)
            continue
        if step.prompt not in terminals:
            where = ("ip", "netns", "exec", "client") if step.is_elsewhere else ()
            terminals[step.prompt] = Terminal(where, environment)
        code, said = terminals[step.prompt].type(step.command)
        if step.is_hidden and code:
            raise SystemExit(f"{step.command}: exit code {code}\n{said}")
        printed.append("" if step.is_hidden else said)
    return printed


def is_here(program: str) -> bool:
    """Whether there is such a program, and every user may start it: the checkout may be hidden from others."""
    if program == "systemd":
        return _SYSTEMD.exists() and _OWN_CGROUP in sys.argv
    found = shutil.which(program, path=_SEARCHED)
    return found is not None and all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(found).resolve().parents)


@contextlib.contextmanager
def _own_cgroup() -> Iterator[None]:
    """A control group for this process and all below it; what systemd makes there goes at the end. Raises HostError."""
    with own_groups() as groups:
        try:
            yield
        finally:
            made = sorted((path for path in groups.home.rglob("*") if path.is_dir()), reverse=True)
            for directory in made:
                remove(directory)


def played_apart(name: str) -> list[tuple[Step, str]]:
    """Play a page in namespaces of its own; its commands, and what each printed."""
    page = (ROOT / name).read_text(encoding="utf-8")
    words = [*APART, sys.executable, "-m", "tests.pages.stage", name]
    with contextlib.ExitStack() as stack:
        if "<!-- needs: systemd -->" in page:
            with contextlib.suppress(HostError):
                stack.enter_context(_own_cgroup())
                words = ["unshare", "--cgroup", *words, _OWN_CGROUP]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT_DIRECTORY, check=False)
    assert done.returncode == 0, done.stderr
    return list(zip(steps(page), json.loads(done.stdout), strict=True))


if __name__ == "__main__":
    os.umask(0o022)
    json.dump(play((ROOT / sys.argv[1]).read_text(encoding="utf-8")), sys.stdout)

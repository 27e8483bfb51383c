"""A host on which a page is played, and another machine: made of namespaces, gone with this process.

    unshare ... python -m tests.pages.stage PAGE      prints a JSON list of what each command printed

It has its own processes, network, /etc, /run and /var/lib; what commands write elsewhere would be written for good.
The host has the addresses 10.0.0.5 and fd00::5, the users kuma-dp (uid 5678) and app (uid 1000), and a route to the
client, 10.0.0.9 and fd00::9, which answers for example.com too, at 203.0.113.10.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.hidden import ROOT_DIRECTORY
from tests.pages.script import ROOT, Step, steps

PATIENCE_SECONDS = 60.0
# The shell is process 1 there: it takes in what has ended in the background.
APART = (
    *("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"),
    *("bash", "-c", '"$@"; exit $?', "-"),
)
_HERE = Path("/run/here")
_SETTING = """
set -e
mount --make-rprivate /
mkdir -p /run/tpctl-etc && mount -t tmpfs none /run/tpctl-etc
cp -a /etc/. /run/tpctl-etc && mount --rbind /run/tpctl-etc /etc
mount -t tmpfs none /run && mkdir -p /run/here /run/netns /run/lock
for folder in /var/lib/tpctl /var/cache/tpctl; do if [ -d $folder ]; then mount -t tmpfs none $folder; fi; done
rm -rf /etc/tpctl
sed -i -E '/^(kuma-dp|app):|:(5678|1000):/d' /etc/passwd
echo 'kuma-dp:x:5678:5678::/nonexistent:/usr/sbin/nologin' >>/etc/passwd
echo 'app:x:1000:1000::/:/bin/sh' >>/etc/passwd
echo 'nameserver 10.0.0.53' >/run/resolv.conf
rm -f /etc/resolv.conf && cp /run/resolv.conf /etc/resolv.conf
printf '127.0.0.1 localhost\\n203.0.113.10 example.com\\n' >/etc/hosts
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


def play(page: str) -> list[str]:
    """Run the commands of a page here; what each printed."""
    subprocess.run(["bash", "-c", _SETTING], check=True, timeout=PATIENCE_SECONDS, stdout=2)
    scripts = sysconfig.get_path("scripts")
    environment = {
        "PATH": f"{scripts}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "100",
    }
    return [_printed(step, environment) for step in steps(page)]


def _printed(step: Step, environment: dict[str, str]) -> str:
    if step.needs and not _is_here(step.needs, environment["PATH"]):
        return step.said
    words = ["bash", "-c", step.command]
    if step.is_elsewhere:
        words = ["ip", "netns", "exec", "client", *words]
    # A file, not a pipe: what goes on in the background would keep a pipe open.
    with (_HERE / ".printed").open("w+", encoding="utf-8") as output:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=_HERE,
            env=environment,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        output.seek(0)
        printed = output.read()
    if step.is_hidden and done.returncode:
        raise SystemExit(f"{step.command}: exit code {done.returncode}\n{printed}")
    return "" if step.is_hidden else printed


def _is_here(program: str, path: str) -> bool:
    """Whether there is such a program, and every user may start it: the checkout may be hidden from others."""
    found = shutil.which(program, path=path)
    return found is not None and all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(found).resolve().parents)


def played_apart(name: str) -> list[tuple[Step, str]]:
    """Play a page in namespaces of its own; its commands, and what each printed."""
    done = subprocess.run(
        [*APART, sys.executable, "-m", "tests.pages.stage", name],
        capture_output=True,
        text=True,
        cwd=ROOT_DIRECTORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (ROOT / name).read_text(encoding="utf-8")
    return list(zip(steps(page), json.loads(done.stdout), strict=True))


if __name__ == "__main__":
    os.umask(0o022)
    json.dump(play((ROOT / sys.argv[1]).read_text(encoding="utf-8")), sys.stdout)

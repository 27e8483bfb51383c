"""A host of its own for hostile tests: network, /run and /var/cache are private, and nobody's commands can be run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.hidden import ROOT_DIRECTORY, hide
from tests.netns.lab import PROXY_USER

NOBODY = 65534
SETTING = f"""
set -e
mount --make-rprivate /
{hide("/run")}
{hide("/var/cache")}
ip link set lo up
echo ready
exec cat
"""


class Room:
    """Runs commands there."""

    def __init__(self, holder: int) -> None:
        self.holder = holder

    def run(
        self, *argv: str, environment: Mapping[str, str] | None = None, folder: Path = ROOT_DIRECTORY
    ) -> subprocess.CompletedProcess[str]:
        """As root; with just this environment if one is given."""
        words = ["/usr/bin/nsenter", f"--target={self.holder}", "--mount", "--net", f"--wd={folder}", *argv]
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=300)

    def tpctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The real command."""
        return self.run(sys.executable, "-m", "tpctl.cli.main", *arguments)

    def install(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """`tpctl install` of something small."""
        return self.tpctl("install", "--kuma-dp-user", PROXY_USER, "--ip-family-mode", "ipv4", *flags)

    def nobody(self, script: str) -> subprocess.CompletedProcess[str]:
        """A shell script as an unprivileged user."""
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
        return self.run(*drop, "/bin/sh", "-c", script, folder=Path("/"))

    def path(self, inside: str) -> Path:
        """A path of the room, seen from outside."""
        return Path(f"/proc/{self.holder}/root{inside}")

    def folder(self) -> Path:
        """Where its record lies while something is installed."""
        (found,) = (one for one in self.path("/run/tpctl").iterdir() if one.is_dir())
        return found

    def key(self) -> str:
        """The name of its network namespace in /run/tpctl."""
        code = "from tpctl.record.state import namespace_key; print(namespace_key())"
        return self.run(sys.executable, "-c", code).stdout.strip()

    def rules(self) -> str:
        """Everything of nf_tables and of both variants of iptables."""
        legacy = [self.run(f"{tool}-legacy-save").stdout for tool in ("iptables", "ip6tables")]
        return self.run("nft", "list", "ruleset").stdout + "".join(
            line for text in legacy for line in text.splitlines(keepends=True) if not line.startswith("#")
        )


@contextlib.contextmanager
def room() -> Iterator[Room]:
    """A room for the length of the block."""
    argv = ["unshare", "--mount", "--net", "sh", "-c", SETTING]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "ready\n"
            yield Room(holder.pid)
        finally:
            holder.communicate()


def ok(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that has to succeed printed."""
    assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
    return done.stdout

"""Beside a program with thousands of nf_tables rules that changes some of them all the time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.netns.lab import bare_namespace, run
from tpctl.system import child
from tpctl.system.errors import ApplyError

pytestmark = pytest.mark.root

RULES = 6000
PATIENCE_SECONDS = 120
_CHURN = """
while :; do
    nft add rule inet site churn udp dport 1 counter
    nft flush chain inet site churn
done
"""
_FLAGS = ("--kuma-dp-user", "65534", "--exclude-inbound-ports", "22")


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A namespace where nobody gets to read everything between two changes, and the program that makes them."""
    with bare_namespace() as space, space.inside():
        rules = "".join(f"add rule inet site many udp dport {20000 + number} counter\n" for number in range(RULES))
        chains = "add table inet site\nadd chain inet site churn\nadd chain inet site many\n"
        run(["nft", "-f", "-"], stdin=chains + rules)
        churn = subprocess.Popen(["sh", "-c", _CHURN])
        try:
            time.sleep(0.5)
            yield churn
        finally:
            churn.kill()
            churn.wait()


def tpctl(*arguments: str, code: int = 0) -> str:
    """Run the command; it must end with `code`, and soon."""
    done = subprocess.run(
        [sys.executable, "-m", "tpctl.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "engine",
    [("--engine", "nftables"), ("--iptables-mode", "nft"), ("--iptables-mode", "legacy")],
    ids=["nftables", "iptables-nft", "iptables-legacy"],
)
def test_every_command_ends(busy: subprocess.Popen[bytes], engine: tuple[str, ...]) -> None:
    tpctl("install", *_FLAGS, *engine)
    status = tpctl("status", code=3)
    assert status.count("problem: nothing listens") == 2, status
    verdict, _, rest = status.partition("\n")
    assert verdict.endswith("; 2 problems, see below")
    assert "problem" not in rest.replace("problem: nothing listens", ""), status
    tpctl("install", *_FLAGS, "--exclude-outbound-ports", "3306", *engine)
    tpctl("uninstall")
    assert tpctl("status") == "installed: nothing\n"
    busy.kill()  # or nft, which begins anew at each change, would read for very long
    assert "tpctl" not in run(["nft", "list", "table", "inet", "site"]).stdout


def test_work_that_never_comes_back_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(ApplyError, match=r"within 0\.5 s"):
        child.in_child(_sleeping, seconds=0.5)
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_a_crash_is_told() -> None:
    with pytest.raises(child.ChildFailedError, match="status -9"):
        child.in_child(_crashing)


def _sleeping() -> str:
    time.sleep(10 * PATIENCE_SECONDS)
    return "awake"


def _crashing() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "alive"

"""With little memory a change ends, all or nothing, and lets go of the lock: nothing waits for what ran out of it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from tests.netns.lab import bare_namespace, snapshot
from tpctl.record import state

pytestmark = pytest.mark.root

PATIENCE_SECONDS = 300
KILOBYTES = (30_000, 36_000, 40_000, 44_000, 48_000, 60_000)
"""Of address space, RLIMIT_AS (getrlimit(2)): from what Python does not start with to what is enough."""


def rules() -> dict[str, list[str]]:
    """What stands in the namespace, but for the empty tables that the legacy variant leaves."""
    shown = snapshot(counters=False)
    return {
        what: [line for line in text.splitlines() if "save" not in what or line.startswith("-A")]
        for what, text in shown.items()
    }


@pytest.mark.parametrize(
    "engine",
    [("nftables",), ("iptables", "--iptables-mode", "nft"), ("iptables", "--iptables-mode", "legacy")],
    ids=lambda engine: engine[-1],
)
def test_an_install_ends(engine: tuple[str, ...]) -> None:
    with bare_namespace() as space, space.inside():
        before = rules()
        for size in KILOBYTES:
            done = subprocess.run(
                [sys.executable, "-m", "tpctl.cli.main", "install", "--kuma-dp-user", "65534", "--engine", *engine],
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=False,
                preexec_fn=lambda size=size: resource.setrlimit(resource.RLIMIT_AS, (size * 1024, size * 1024)),  # type: ignore[misc]  # a default binds the size
            )
            held = state.load()
            if done.returncode == 0:
                assert held is not None
                assert held.phase == state.INSTALLED
                break
            if "rollback failed too" in done.stderr:  # for want of memory as well; then that is said, and the way out
                subprocess.run([sys.executable, "-m", "tpctl.cli.main", "uninstall"], check=True, capture_output=True)
            with state.locked():
                assert rules() == before, done.stderr

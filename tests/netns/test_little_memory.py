"""With little memory a change ends, all or nothing, and lets go of the lock: nothing waits for what ran out of it."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pytest

from tests.netns.lab import bare_namespace, snapshot
from tpctl.change import lifecycle
from tpctl.engines.iptables.engine import IptablesEngine
from tpctl.record import state
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Policy
from tpctl.system.errors import ApplyError

pytestmark = pytest.mark.root

PATIENCE_SECONDS = 300
KILOBYTES = (30_000, 38_000, 46_000, 60_000, 80_000, 95_000, 105_000, 160_000)
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
        else:
            pytest.fail(f"{KILOBYTES[-1]} kB are not enough: {done.stderr}")


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_rules_for_which_memory_runs_out_are_taken_back(variant: str) -> None:
    """One family's rules are in the kernel by then, and Python raises what is no OSError."""
    real, calls = IptablesEngine._commit, 0

    def commit(*arguments: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        call: Callable[..., None] = real
        call(*arguments, **options)

    with bare_namespace() as space, space.inside():
        before = rules()
        with (
            mock.patch.object(IptablesEngine, "_commit", staticmethod(commit)),
            pytest.raises(ApplyError, match=r"^there is not enough memory\. Everything was rolled back"),
        ):
            lifecycle.install(Policy(65534), EngineOptions(engine="iptables", iptables_mode=variant))
        with state.locked():
            assert rules() == before
            assert state.load() is None
        assert calls > 2

"""Programs that never come back: the change is taken back, which is said, and the lock is free."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.netns.lab import bare_namespace, snapshot
from tpctl.change import lifecycle
from tpctl.record import state
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family, Policy
from tpctl.system import runner
from tpctl.system.errors import ApplyError

pytestmark = pytest.mark.root

_RESTORE = """#!/bin/sh
case "$*" in
*--version*) exec iptables-nft-restore "$@" ;;
esac
sleep 1000 & sleep 1000
"""


def test_an_iptables_restore_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "iptables-restore"
    fake.write_text(_RESTORE)
    fake.chmod(0o755)
    real = {
        name: shutil.which(f"{name.replace('iptables', 'iptables-nft')}") or ""
        for name in ("iptables", "iptables-save")
    }
    options = EngineOptions(engine="iptables", executables={**real, "iptables-restore": str(fake)})
    with bare_namespace() as space, space.inside():
        before = snapshot(counters=False)
        monkeypatch.setattr(runner, "TIMEOUT_SECONDS", 4.0)
        with pytest.raises(ApplyError, match=r"iptables-restore .* did not end within 4 s and was killed"):
            lifecycle.install(Policy(65534, families=frozenset({Family.IPV4})), options)
        monkeypatch.undo()
        assert snapshot(counters=False) == before
        assert state.load() is None
        with state.locked():
            pass

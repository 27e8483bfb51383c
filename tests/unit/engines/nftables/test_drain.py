"""Which connections an uninstall waits for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpctl.engines.nftables import drain
from tpctl.host import conntrack, proc

REDIRECTED = (
    "ipv4     2 tcp      6 431999 ESTABLISHED src=10.0.0.1 dst=203.0.113.10 sport=24658 dport=8080 "
    "src=127.0.0.1 dst=10.0.0.1 sport=15001 dport=24658 [ASSURED] mark=0 zone=0 use=2"
)
DIRECT = REDIRECTED.replace("203.0.113.10", "127.0.0.1").replace("dport=8080", "dport=15001")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (REDIRECTED, 1),
        (DIRECT, 0),
        (REDIRECTED.replace("ESTABLISHED", "TIME_WAIT"), 0),
        (REDIRECTED.replace("sport=15001", "sport=4444"), 0),
        (REDIRECTED.replace("tcp      6", "udp      17").replace(" ESTABLISHED", ""), 0),
        ("", 0),
    ],
)
def test_only_running_redirected_connections_count(
    line: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / conntrack.LISTING).write_text(f"{line}\n")
    monkeypatch.setattr(proc, "NET", tmp_path)
    assert drain.running((15001, 15006)) == count
    assert drain.running(()) == 0

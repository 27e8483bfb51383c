"""What is known of connections where the kernel does not say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tpctl.host import conntrack, proc
from tpctl.host.conntrack import Entry


@pytest.mark.parametrize("refused", [True, False], ids=["refused", "no netlink"])
def test_a_kernel_that_cannot_be_asked_has_no_entries(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(family: int) -> Iterator[Entry]:
        raise OSError(1, "Operation not permitted") if refused else OSError(93, "Protocol not supported")

    monkeypatch.setattr(proc, "NET", tmp_path)
    monkeypatch.setattr(conntrack, "_asked", asked)
    assert list(conntrack.entries()) == []

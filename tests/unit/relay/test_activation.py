"""Sockets that the service manager has kept."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import structlog

from tpctl.relay.process import activation
from tpctl.relay.process.activation import Inherited
from tpctl.relay.settings.model import Settings


def test_a_socket_that_belongs_to_no_listener_is_kept_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept, it would go on taking queries or connections that nobody answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, socket.create_server(("127.0.0.1", 0)) as left:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("FDSTORE", "512")
        assert activation.match(Settings(), [Inherited("dns-53", left)], structlog.get_logger()) == {}
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=dns-53"
        assert left.fileno() == -1

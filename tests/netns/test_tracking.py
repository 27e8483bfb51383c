"""Connections that conntrack is told about before kumactl's rules come back, and those that end meanwhile."""

from __future__ import annotations

import socket
import struct
from unittest import mock

import pytest

from tests.netns.lab import bare_namespace, run
from tpctl.change import tracking
from tpctl.host import conntrack, sockets

pytestmark = [pytest.mark.root, pytest.mark.needs("conntrack", "ipv6")]


def known(port: int) -> bool:
    """Whether conntrack has an entry of a connection from a port."""
    return any(port in (entry.original.source_port, entry.reply.source_port) for entry in conntrack.entries())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_ended_while_it_was_told_is_forgotten_and_what_runs_is_known(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with bare_namespace() as space, space.inside(), socket.create_server((host, 0), family=family) as listener:
        ends = listener.getsockname()[:2]
        with socket.create_connection(ends) as running, socket.create_connection(ends) as ending:
            served = [listener.accept()[0] for _ in range(2)]
            there = sockets.connections()
            ports = [client.getsockname()[1] for client in (running, ending)]
            ending.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            ending.close()  # by a reset, so that nothing of it is left
            assert not any(known(port) for port in ports)
            listed = mock.patch.object(sockets, "connections", side_effect=[there, sockets.connections()])
            with listed, tracking.running_connections_known():
                assert all(known(port) for port in ports)
                run(
                    ["nft", "add table inet kept { chain kept { type filter hook output priority 0; ct state new; }; }"]
                )
            assert [known(port) for port in ports] == [True, False]
            for one in served:
                one.close()

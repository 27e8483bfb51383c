"""resolv.conf."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import HostError
from agent.host.resolvers import parse_name_servers, read_resolv_conf


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("", []),
        ("nameserver 10.0.0.53\n", ["10.0.0.53"]),
        ("search a b\nnameserver 10.0.0.53\noptions ndots:5\nnameserver fd00::53", ["10.0.0.53", "fd00::53"]),
        ("# nameserver 1.1.1.1\n; nameserver 1.1.1.2\n  nameserver\t1.1.1.3 # router", ["1.1.1.3"]),
        ("nameserver\nnameserver x\nnameserver 1.1.1.256\nnameservers 1.1.1.1\nNAMESERVER 1.1.1.1", []),
        ("nameserver fe80::1%eth0\nnameserver fe80::1%eth1", ["fe80::1%eth0", "fe80::1%eth1"]),
        ("nameserver fd00::1%eth0", ["fd00::1"]),
        ("nameserver ::ffff:10.0.0.1", ["10.0.0.1"]),
        ("nameserver 10.0.0.1\nnameserver ::ffff:10.0.0.1\nnameserver 10.0.0.1", ["10.0.0.1"]),
        ("nameserver 127.0.0.53\r\n", ["127.0.0.53"]),
        ("nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4",
         ["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"]),
    ],
)  # fmt: skip
def test_name_servers(text: str, servers: list[str]) -> None:
    assert [str(server) for server in parse_name_servers(text)] == servers


@given(st.text(max_size=60).map(lambda rest: f"nameserver {rest}"))
def test_junk_is_skipped(text: str) -> None:
    parse_name_servers(text)


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_bytes(b"# caf\xe9\nnameserver 1.1.1.1\n")
    assert [str(server) for server in parse_name_servers(read_resolv_conf(str(path)))] == ["1.1.1.1"]
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(HostError, match=f"{missing} cannot be read: "):
            read_resolv_conf(str(missing))

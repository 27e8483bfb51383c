"""Listening sockets, from the kernel's text and from the running kernel."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NoReturn

import pytest

from tpctl.host import sock_diag
from tpctl.host.sockets import Ends, Listener, connections, listeners, parse_connections, parse_listeners, process_uid
from tpctl.spec.policy import Protocol

PATIENCE_SECONDS = 30.0
HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
TCP = (
    HEADER
    + "   0: 0100007F:3A9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000  5678 0 1590 1 0 100 0 0 10 0\n"
    + "   1: 0100007F:3A9E 0100007F:C350 01 00000000:00000000 00:00000000 00000000  5678 0 1591 1 0 100 0 0 10 0\n"
    + "   2: nonsense\n\n"
)
UDP6 = (
    HEADER
    + "   5: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000 "
    + "00:00000000 00000000   101        0 77 2 0 0\n"
)
little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="the texts are of a little-endian machine")


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@little_endian
def test_parse() -> None:
    assert list(parse_listeners(Protocol.TCP, TCP)) == [
        Listener(Protocol.TCP, IPv4Address("127.0.0.1"), 15006, 5678, 1590)
    ]
    assert list(parse_listeners(Protocol.UDP, UDP6)) == [Listener(Protocol.UDP, IPv6Address("::1"), 53, 101, 77)]
    assert list(parse_listeners(Protocol.TCP, "")) == []


@little_endian
def test_parse_connections() -> None:
    here = IPv4Address("127.0.0.1").packed
    assert list(parse_connections(TCP)) == [Ends(here, 15006, here, 50000)]
    assert list(parse_connections("")) == []


@pytest.mark.parametrize("asked", ["sock_diag", "/proc"])
@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=pytest.mark.needs("ipv6"))])
def test_both_ends_of_a_connection_are_seen_until_it_is_over(
    address: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's socket is one of IPv6 for both: an IPv4 client's address is seen as that, not as a mapped one."""

    def lacking(*_of: object) -> NoReturn:
        raise OSError(errno.ENOENT, "no tcp_diag")

    if asked == "/proc":
        monkeypatch.setattr(sock_diag, "dump", lacking)
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        dialler = socket.create_connection((address, listener.getsockname()[1]))
        accepted, _ = listener.accept()
        packed, ports = ip_address(address).packed, (dialler.getsockname()[1], listener.getsockname()[1])
        ends = Ends(packed, ports[0], packed, ports[1])
        both = {ends, Ends(packed, ports[1], packed, ports[0])}
        until(lambda: both <= connections())
        dialler.close()
        accepted.close()
        until(lambda: not both & connections())  # it is over as soon as the last segment has arrived


@pytest.mark.parametrize(
    ("bound", "asked", "taken"),
    [
        ("127.0.0.53", "127.0.0.53", True),
        ("127.0.0.53", "127.0.0.1", False),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "::1", False),
        ("::", "::1", True),
        ("::", "127.0.0.1", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
    ],
)
def test_takes(bound: str, asked: str, taken: bool) -> None:
    assert Listener(Protocol.UDP, ip_address(bound), 53, 0, 1).takes(ip_address(asked)) is taken


def is_seen(expected: Listener) -> bool:
    """Whether the kernel lists it; it leaves one out when others end while it does so."""
    found = listeners(expected.protocol)
    return expected in [one._replace(v6only=False, transparent=None, cookie=None) for one in found]


@pytest.mark.parametrize(
    ("family", "host"),
    [(socket.AF_INET, "127.0.0.1"), pytest.param(socket.AF_INET6, "::1", marks=pytest.mark.needs("ipv6"))],
)
def test_the_running_kernel(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as tcp, socket.socket(family, socket.SOCK_DGRAM) as udp:
        for one, protocol in ((tcp, Protocol.TCP), (udp, Protocol.UDP)):
            one.bind((host, 0))
            if protocol is Protocol.TCP:
                one.listen()
            inode = os.fstat(one.fileno()).st_ino
            expected = Listener(protocol, ip_address(host), one.getsockname()[1], os.geteuid(), inode)
            until(partial(is_seen, expected))
            assert process_uid(inode) == os.geteuid()


def test_process_of_no_socket() -> None:
    assert process_uid(0) is None


def test_a_process_cannot_tell_another_uid_by_its_name() -> None:
    """What a carriage return in the name of a process brings about is still a part of its name."""
    code = """
import os, socket
held = socket.socket()
open("/proc/self/comm", "w").write("\\rUid:\\t9 9 9 9")
print(os.fstat(held.fileno()).st_ino, flush=True)
input()
"""
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as named:
        assert named.stdout is not None
        found = process_uid(int(named.stdout.readline()))
        named.communicate("\n")
    assert found == os.geteuid()

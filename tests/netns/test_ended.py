"""Connections that are over, and that conntrack remembers: whoever has their ports next goes where the rules say."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.netns.lab import APP, PROXY, PROXY_USER, ROOT, run, tpctl
from tpctl.host import conntrack
from tpctl.host.conntrack import Entry
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, PEER_ADDRESS, Layout
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
APPLICATION, DATA_PLANE = b"A", b"P"
PORT = 8080
RESET, KEEP = b"R", b"K"
_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return ENGINES[request.param]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(Layout()) as made, contextlib.ExitStack() as stack:
        for space, port, letter in (
            (HOST, PORT, APPLICATION), (PEER, PORT, APPLICATION), (HOST, 15001, DATA_PLANE), (HOST, 15006, DATA_PLANE),
        ):  # fmt: skip
            for family in _FAMILIES.values():
                stack.enter_context(_serving(made, space, family, port, letter))
        yield made
        with made.inside(HOST):
            tpctl("uninstall")


@contextlib.contextmanager
def _serving(lab: Lab, space: str, family: socket.AddressFamily, port: int, letter: bytes) -> Iterator[None]:
    """A server that says who it is, and resets the connection if it is asked to."""
    with lab.inside(space):
        listener = socket.create_server(("::" if family == socket.AF_INET6 else "0.0.0.0", port), family=family)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = listener.accept()
                threading.Thread(target=answer, args=(accepted,), daemon=True).start()

    def answer(accepted: socket.socket) -> None:
        with contextlib.suppress(OSError), accepted:
            accepted.sendall(letter)
            if accepted.recv(1) == RESET:
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _dial(lab: Lab, space: str, family: Family, port: int, user: int = ROOT) -> tuple[socket.socket, bytes]:
    """Dial the other end's port 8080 from `port`; the connection, and who answered."""
    address = (HOST_ADDRESS if space == PEER else PEER_ADDRESS)[family]
    with lab.inside(space, user):
        made = socket.socket(_FAMILIES[family])
        made.settimeout(60.0)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("", port))
        made.connect((str(address), PORT))
    return made, made.recv(1)


def _who(lab: Lab, space: str, family: Family, port: int, user: int = ROOT) -> bytes:
    made, letter = _dial(lab, space, family, port, user)
    made.close()
    return letter


def _is_reset(lab: Lab, space: str, family: Family, port: int) -> bytes:
    """Let the server reset the connection; who it was."""
    made, letter = _dial(lab, space, family, port)
    with made, contextlib.suppress(ConnectionResetError):
        made.sendall(RESET)
        made.recv(1)
    return letter


def _install(lab: Lab, engine: tuple[str, ...], *flags: str) -> None:
    with lab.inside(HOST):
        tpctl("install", "--kuma-dp-user", PROXY_USER, *engine, *flags)


def test_after_a_reset_of_the_server(lab: Lab, engine: tuple[str, ...]) -> None:
    excluded = ("--exclude-inbound-ports", str(PORT), "--exclude-outbound-ports", str(PORT))
    ways = list(itertools.product((PEER, HOST), Family))
    _install(lab, engine, *excluded)
    assert {_is_reset(lab, *way, 41001) for way in ways} == {APPLICATION}
    _install(lab, engine)
    assert {_who(lab, *way, 41001) for way in ways} == {DATA_PLANE}
    assert {_is_reset(lab, *way, 41002) for way in ways} == {DATA_PLANE}
    _install(lab, engine, *excluded)
    assert {_who(lab, *way, 41002) for way in ways} == {APPLICATION}


def test_after_an_end_that_conntrack_did_not_see(lab: Lab, engine: tuple[str, ...]) -> None:
    """Nobody needs conntrack between an uninstall and an install."""
    _install(lab, engine)
    dialled = [_dial(lab, HOST, family, 41003, PROXY) for family in Family]
    assert {letter for _, letter in dialled} == {APPLICATION}
    with lab.inside(HOST):
        tpctl("uninstall")
    for made, _ in dialled:
        made.close()
    _install(lab, engine)
    assert {_who(lab, HOST, family, 41003, APP) for family in Family} == {DATA_PLANE}


def _remember(source: str, destination: str, port: int, *more: str) -> None:
    """An entry of an open connection, as one late packet leaves it."""
    run(
        ["conntrack", "-I", "-p", "tcp", "-s", source, "-d", destination,
         "--sport", str(port), "--dport", str(PORT), "--state", "ESTABLISHED", "-u", "SEEN_REPLY", "-t", "300", *more]
    )  # fmt: skip


def test_what_is_not_over_stays(lab: Lab) -> None:
    _install(lab, ENGINES["nftables"], "--exclude-inbound-ports", str(PORT))
    running = [_dial(lab, PEER, family, 41004) for family in Family]
    assert {letter for _, letter in running} == {APPLICATION}
    with lab.inside(HOST):
        for family, far, farther in (
            (Family.IPV4, "192.0.2.1", "192.0.2.2"),
            (Family.IPV6, "2001:db8::1", "2001:db8::2"),
        ):
            here, there = str(HOST_ADDRESS[family]), str(PEER_ADDRESS[family])
            _remember(there, here, 41005)
            _remember(far, farther, 41006)
            _remember(there, here, 41007, "--zone", "7")
        assert _ports(conntrack.entries()) == Counter((41004, 41005, 41006, 41007) * 2)
    _install(lab, ENGINES["nftables"])
    with lab.inside(HOST):
        assert _ports(conntrack.entries()) == Counter((41004, 41006, 41007) * 2)
    assert {_who(lab, PEER, family, 41005) for family in Family} == {DATA_PLANE}
    for made, _ in running:
        made.sendall(KEEP)
        assert made.recv(1) == b"", "the application has ended it"
        made.close()


def _ports(entries: Iterator[Entry]) -> Counter[int]:
    return Counter(entry.original.source_port for entry in entries)


def test_both_ways_of_asking_see_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(lab, ENGINES["nftables"])
    with lab.inside(HOST):
        for number, family in enumerate(Family):
            _remember(str(PEER_ADDRESS[family]), str(HOST_ADDRESS[family]), 41010 + number, "-m", "2049")
            _remember(str(PEER_ADDRESS[family]), str(HOST_ADDRESS[family]), 41020 + number, "--zone", "7")
    connections = [_dial(lab, PEER, family, 41030)[0] for family in Family]
    with lab.inside(HOST):
        listed = sorted(conntrack.entries())
        monkeypatch.setattr(conntrack, "LISTING", "nonexistent")
        asked = sorted(conntrack.entries())
    assert asked == listed
    assert [
        (entry.original.source_port, entry.mark, entry.has_zone, entry.is_redirected)
        for entry in sorted(listed, key=lambda entry: entry.original.source_port)
    ] == [
        (41010, 2049, False, False),
        (41011, 2049, False, False),
        (41020, 0, True, False),
        (41021, 0, True, False),
        (41030, 0, False, True),
        (41030, 0, False, True),
    ]
    for made in connections:
        made.close()

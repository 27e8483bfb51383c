"""The eBPF engine's maps under many connections: nothing is left behind, and nothing goes astray when they are full.

Three maps hold what traffic brings. `asked` is storage of the sockets, and goes with each of them; `in_flight`, between
a connection's SYN and the data plane's accept, forgets the oldest when it is full; `listeners` has the data plane's.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import pytest

from tests.extent import share
from tests.netns.engines import socket_storage
from tests.netns.engines.ebpf_scene import (
    APP,
    FAMILIES,
    PLAIN,
    PROXY,
    REMOTE,
    SERVER,
    Scene,
    laboratory,
    listening,
)
from tests.swap.traffic import Child
from tpctl.bpf import syscall
from tpctl.engines.ebpf.installed import opened
from tpctl.engines.ebpf.maps import IN_FLIGHT
from tpctl.rehearsal.cgroup import own_place
from tpctl.rehearsal.layout import HOST
from tpctl.rehearsal.namespaces import write_sysctls
from tpctl.spec.policy import Family, Protocol, WhenProxyDown

pytestmark = pytest.mark.root

CONNECTIONS = share(20_000, 100_000)
QUERIES = CONNECTIONS // 10
CLIENTS = 2
CHECKED = 8
"""Of so many connections one is held open until the data plane has said where it was going."""
SETTLE_SECONDS = 60.0
PORTS = range(2000, 60000)
MEMORY = "core/optmem_max"
"""What a socket may hold besides its buffers, in bytes; each namespace has its own since Linux 6.8."""
_ABORT = struct.pack("ii", 1, 0)
_SO_ORIGINAL_DST = 80
_BIND_ADDRESS_NO_PORT = 24


@pytest.fixture
def scene() -> Iterator[Scene]:
    with own_place() as place, laboratory(place) as made:
        made.apply(PLAIN)
        yield made


def opening(address: str, port: int, source: str | None = None) -> socket.socket:
    """A connection that ends without a TIME_WAIT. Raises OSError."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        if source is not None:
            made.setsockopt(socket.SOL_IP, _BIND_ADDRESS_NO_PORT, 1)
            made.bind((source, 0))
        made.connect((address, port))
    except OSError:
        made.close()
        raise
    return made


def original(accepted: socket.socket) -> tuple[str, int]:
    """Where a connection was going. Raises OSError when nobody knows."""
    if accepted.family == socket.AF_INET:
        raw = accepted.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), int.from_bytes(raw[2:4])
    raw = accepted.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), int.from_bytes(raw[2:4])


def _answer(pipe: Pipe, address: str) -> None:
    """The simplest data plane: tells who waits for it where he was going; ends with its process."""
    listener = listening(address, 15001, shared=True)
    listener.settimeout(None)
    pipe.send("ready")
    while True:
        accepted, _ = listener.accept()
        with accepted, contextlib.suppress(ConnectionError):
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            if accepted.recv(1):
                accepted.sendall(repr(original(accepted)).encode())
                accepted.recv(1)


def _open_and_close(pipe: Pipe, first: int, number: int) -> Counter[str]:
    """Open connections of both families (also from sockets of the other) and ask servers; hands back what failed."""
    pipe.send("ready")
    pipe.recv()
    failed: Counter[str] = Counter()
    addresses = [str(REMOTE[Family.IPV4]), str(REMOTE[Family.IPV6]), f"::ffff:{REMOTE[Family.IPV4]}"]
    for turn in range(first, first + number):
        address, port = addresses[turn % len(addresses)], PORTS[turn % len(PORTS)]
        with opening(address, port) as made:
            if turn % CHECKED == 0:
                made.sendall(b"?")
                said = made.recv(128).decode()
                expected = repr((address.removeprefix("::ffff:"), port))
                if said != expected:
                    failed[f"{expected} became {said}"] += 1
        if turn % (CONNECTIONS // QUERIES) == 0:
            _ask(turn)
    return failed


def _ask(turn: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        if turn % 20:
            asking.connect((SERVER, 53))
            asking.send(b"query")
        else:
            asking.sendto(b"query", (SERVER, 53))


@contextlib.contextmanager
def data_plane(scene: Scene) -> Iterator[None]:
    """Processes that answer at the outbound port, and a socket for queries."""
    space = scene.lab.spaces[HOST]
    with scene.lab.inside(HOST, PROXY):
        queries = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        queries.bind(("127.0.0.1", 15053))
    servers = [Child(space, PROXY, lambda pipe, where=where: _answer(pipe, where)) for where in ("0.0.0.0", "::")]  # type: ignore[misc]
    try:
        yield
    finally:
        for server in servers:
            server.process.terminate()
            server.process.join(10)
        queries.close()


def held(scene: Scene) -> dict[str, int]:
    """The entries of every map, once the kernel has put away the sockets that were closed."""
    end = time.monotonic() + SETTLE_SECONDS
    while (counts := _held(scene))["asked"] and time.monotonic() < end:
        time.sleep(0.05)
    return counts


def _held(scene: Scene) -> dict[str, int]:
    with scene.lab.inside(HOST), opened(scene.engine.where.folder) as found:
        counts = {"asked": socket_storage.count(found.maps["asked"])}
        for name, descriptor in found.maps.items():
            if name not in counts:
                counts[name] = len(list(syscall.keys(descriptor, syscall.map_info(descriptor).shape.key_size)))
        return counts


def run_clients(scene: Scene, connections: int) -> Counter[str]:
    """Open and close that many in several processes; hands back what went astray."""
    share = connections // CLIENTS
    children = [
        Child(
            scene.lab.spaces[HOST],
            APP,
            lambda pipe, first=number * share: _open_and_close(pipe, first, share),  # type: ignore[misc]
        )
        for number in range(CLIENTS)
    ]
    failed: Counter[str] = Counter()
    for child in children:
        child.pipe.send("begin")
    for child in children:
        failed += child.result()
    return failed


def counted(scene: Scene) -> dict[str, int]:
    """What is held before anything has happened; the test is skipped where the kernel does not tell."""
    try:
        return held(scene)
    except OSError as refused:
        pytest.skip(f"this kernel does not show what sockets hold by sock_diag: {refused}")


def test_what_open_sockets_hold_is_counted(scene: Scene) -> None:
    assert counted(scene)["asked"] == 0
    with data_plane(scene), contextlib.ExitStack() as opened_here:
        for number, address in enumerate(map(str, REMOTE.values()), 1):
            with scene.lab.inside(HOST, APP):
                opened_here.enter_context(opening(address, 8080))
            assert _held(scene)["asked"] >= number
    assert held(scene)["asked"] == 0


def test_connections_leave_nothing_behind(scene: Scene) -> None:
    """All of them, and a query for every tenth; each eighth is asked where it went."""
    before = counted(scene)
    with data_plane(scene):
        assert not run_clients(scene, CONNECTIONS)
    assert held(scene) == before
    assert (before["asked"], before["in_flight"]) == (0, 0)
    figures = scene.figures()
    assert (figures["outbound redirected"], figures["dns redirected"]) == (CONNECTIONS, QUERIES)


def refused(scene: Scene, number: int) -> None:
    """Connections that nobody accepts: each leaves an entry in the map of those in flight, by its source."""
    with scene.lab.inside(HOST, APP):
        for turn in range(number):
            with pytest.raises(ConnectionRefusedError):
                opening(str(REMOTE[Family.IPV4]), PORTS[turn % len(PORTS)], f"127.0.1.{turn % 16}")


def test_connections_that_nobody_accepts_fill_a_map_and_misdirect_nothing(scene: Scene) -> None:
    counted(scene)
    refused(scene, IN_FLIGHT + IN_FLIGHT // 8)
    counts = held(scene)
    assert counts["asked"] == 0
    assert IN_FLIGHT * 3 // 4 < counts["in_flight"] <= IN_FLIGHT
    with data_plane(scene):
        assert not run_clients(scene, CONNECTIONS // 20)
    counts = held(scene)
    assert counts["asked"] == 0
    assert counts["in_flight"] <= IN_FLIGHT


def test_an_entry_of_a_refused_connection_speaks_for_no_other(scene: Scene) -> None:
    """The data plane's user dials it, from the port that a refused connection had."""
    with scene.lab.inside(HOST, APP), socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        source = first.getsockname()
        with pytest.raises(ConnectionRefusedError):
            first.connect((str(REMOTE[Family.IPV4]), 8080))
    with scene.lab.inside(HOST, PROXY):
        listener = listening("0.0.0.0", 15001)
    with listener, scene.lab.inside(HOST, PROXY), socket.socket() as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        second.bind(source)
        second.connect(("127.0.0.1", 15001))
        accepted, _ = listener.accept()
        with accepted, pytest.raises(OSError, match=r"No such file|not available"):
            original(accepted)


@pytest.mark.parametrize("when_down", list(WhenProxyDown))
def test_without_memory_for_a_socket_nothing_reaches_the_data_plane(scene: Scene, when_down: WhenProxyDown) -> None:
    """It could not tell where a connection goes: refused, or straight on where that is wanted."""
    with scene.lab.inside(HOST):
        if not Path("/proc/sys/net", MEMORY).exists():
            pytest.skip("no limit of a namespace's own")
    scene.apply(replace(PLAIN, when_proxy_down=when_down))
    scene.lab.serve_data_plane(PLAIN)
    expected = {
        WhenProxyDown.BLOCK: ["unreachable (Operation not permitted)"] * 3,
        WhenProxyDown.BYPASS: ["peer:8080", "peer:8080", "peer:53"],
    }
    query = scene.lab.layout.outgoing(Protocol.UDP, ip_address(SERVER), 53, APP)
    for limit, answers in (("0", expected[when_down]), ("131072", ["host:15001", "host:15001", "host:15053"])):
        with scene.lab.inside(HOST):
            write_sysctls({MEMORY: limit})
        assert [*(scene.outgoing(family) for family in FAMILIES), scene.who(query)] == answers

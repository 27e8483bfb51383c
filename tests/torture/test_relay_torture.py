"""Thousands of connections at once through the relay, on each path of its pump: nothing lost, nothing left behind.

TORTURE_CONNECTIONS says how many at once; `make torture` has thousands. Each takes a descriptor in the process of
the clients and in that of the servers, and two in the relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki
from tests.netns.relay.net import HOST4, PEER4, Net, Relay
from tests.netns.relay.test_listeners import configured
from tests.torture.peers import clients, server
from tpctl.relay.connections.acceleration import ENOUGH
from tpctl.relay.connections.pump import MAX_PIPES

pytestmark = pytest.mark.root
CONNECTIONS = int(os.environ.get("TORTURE_CONNECTIONS", "300"))
SPARE = 500
"""Descriptors for everything else."""
SLACK, SLACK_PART = 8 * 1024 * 1024, 0.1
"""Bytes, or part of what it began with, whichever is more, by which a process may have grown in the end. Python gives
back arenas of 1 MB, in which nothing may be left: a few of them do hold something, and which ones is chance."""
WARMING = 200
"""Connections before anything is measured, so many that each worker gets some: they import what is imported late, and
touch the pages of libraries."""
WARMING_SECONDS = 8.0
"""Until their memory is given back."""
SECONDS = 180.0 + CONNECTIONS / 10
PORT, ENCRYPTED, DECRYPTED = 9000, 7001, 7002
WAVES = 3
PLAIN = """
workers: {workers}
listeners: [{{listen: "[::]:15001 ipv6only=off backlog=8192", direction: outbound}}]
"""
ENCRYPTS = """
workers: {workers}
listeners:
  - listen: "*:7001 backlog=8192"
    direction: outbound
    upstream: 127.0.0.1:1443
    upstream_tls: {{ca_file: {ca}, server_name: server.test}}
"""
DECRYPTS = """
workers: {workers}
listeners:
  - listen: "*:1443 ssl backlog=8192"
    direction: outbound
    upstream: {peer}:7002
    ssl: {{certificate: {certificate}, certificate_key: {key}}}
"""


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network() as network:
        # Ten thousand clients and as many dials have ports towards one server, again in every wave.
        network.on_host("sysctl", "-qw", "net.ipv4.ip_local_port_range=10000 65535", "net.ipv4.tcp_tw_reuse=1")
        # The relay keeps ports of dials that were reset as long as conntrack remembers them.
        network.on_host("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_timeout_close=1")
        yield network


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(before[1], 2 * CONNECTIONS + SPARE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
    except ValueError:  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def serve(listener: socket.socket, seed: int, messages: int, count: int, tell: Connection) -> None:
    """The server's process."""
    tell.send(asyncio.run(asyncio.wait_for(server(listener, seed, count, messages), SECONDS)))


def wave(net: Net, address: tuple[str, int], seed: int, count: int, messages: int = 0) -> list[str]:
    """Everything once, after so many small messages; what went wrong.

    The server has the address's port, or, if that is the relay's, 7002.
    """
    port = address[1] if address[0] == PEER4 else DECRYPTED
    context = multiprocessing.get_context("fork")
    with net.listen(net.peer, (PEER4, port)) as listener:
        listener.listen(8192)
        told, tell = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(listener, seed, messages, count, tell))
        process.start()
        tell.close()
    with net.inside(net.host):
        sockets = [socket.socket() for _ in range(count)]
    try:
        failures = asyncio.run(asyncio.wait_for(clients(sockets, address, seed, messages), SECONDS))
        return [*failures, *told.recv()]
    finally:
        for sock in sockets:
            sock.close()
        process.kill()
        process.join()
        told.close()


def family(running: Relay) -> list[int]:
    """The relay's process, and its workers."""
    pid = running.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def possible(wanted: int, workers: int) -> int:
    """So many connections as wanted, or as there are descriptors for."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE
    return min(wanted, limit, limit * workers // 2)


def are_at_rest(pids: list[int]) -> bool:
    """Whether all of them wait: a worker that is still starting, or not scheduled, does not."""
    return all(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S" for pid in pids)


def rest(pids: list[int]) -> None:
    """Wait until they have started completely."""
    end, quiet = time.monotonic() + relay_net.PATIENCE, 0
    while quiet < 10 and time.monotonic() < end:
        time.sleep(0.02)
        quiet = quiet + 1 if are_at_rest(pids) else 0


def descriptors(pids: list[int]) -> Counter[str]:
    """How many sockets, pipes and others they have open."""
    kinds: Counter[str] = Counter()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has just been closed
                kinds[str(link.readlink()).partition(":")[0]] += 1
    return kinds


def resident(pids: list[int]) -> list[int]:
    """The memory of each, in bytes."""
    return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() for pid in pids]


def have_returned(before: list[int], now: list[int]) -> bool:
    """Whether each of the processes has what it began with, but for the slack."""
    return all(size <= old + max(SLACK, old * SLACK_PART) for old, size in zip(before, now, strict=True))


def returned(pids: list[int], before: list[int]) -> list[int]:
    """Their memory, once they have given it back: within a quarter of a minute, if they have a processor."""
    end = time.monotonic() + relay_net.PATIENCE
    while not have_returned(before, now := resident(pids)) and time.monotonic() < end:
        time.sleep(0.2)
    return now


def settled(pids: list[int], sockets: int) -> Counter[str]:
    """Their descriptors, once the connections have gone."""
    end = time.monotonic() + relay_net.PATIENCE
    while (found := descriptors(pids))["socket"] > sockets and time.monotonic() < end:
        time.sleep(0.05)
    return found


def least(pids: list[int], seconds: float) -> list[int]:
    """The least memory that each has in so many seconds."""
    end, found = time.monotonic() + seconds, resident(pids)
    while time.monotonic() < end:
        time.sleep(0.2)
        found = [min(pair) for pair in zip(found, resident(pids), strict=True)]
    return found


def megabytes(sizes: list[int]) -> str:
    """For the report."""
    return " + ".join(f"{size / 1e6:.1f}" for size in sizes)


def torture(net: Net, relays: list[Relay], address: tuple[str, int], count: int, messages: int = 0) -> None:
    """Several waves: nothing may go wrong, nothing may be left, and memory goes back to what it was.

    `messages` are the small ones that each connection begins with.
    """
    pids = [pid for running in relays for pid in family(running)]
    rest(pids)
    before = descriptors(pids)
    assert not wave(net, address, WAVES, WARMING, messages)
    settled(pids, before["socket"])
    begin = least(pids, WARMING_SECONDS)
    print(f"\n{megabytes(begin)} MB in the beginning")
    for seed in range(WAVES):
        began = time.monotonic()
        failures = wave(net, address, seed, count, messages)
        assert not failures, f"{len(failures)} of {count}: " + "\n".join(failures[:10])
        seconds, most = time.monotonic() - began, resident(pids)
        after = settled(pids, before["socket"])
        assert after["pipe"] - before["pipe"] <= 2 * MAX_PIPES * len(pids), "pipes are pooled, up to a limit"
        now = returned(pids, begin)
        later = time.monotonic() - began - seconds
        print(f"{count} at once: {seconds:.0f} s, {megabytes(most)} MB, {later:.0f} s later {megabytes(now)} MB")
        assert have_returned(begin, now), f"{megabytes(begin)} MB in the beginning, {megabytes(now)} in the end"
    after = descriptors(pids)
    for kinds in (before, after):
        del kinds["pipe"]
    assert after == before
    assert [pid for running in relays for pid in family(running)] == pids, "nobody has died"


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_and_splices(net: Net, tmp_path: Path, workers: int) -> None:
    """The plain paths: small streams are copied, large ones spliced, through large pipes and, beyond the user's share
    of pipe memory, through small ones or none."""
    with configured(net, tmp_path, PLAIN.format(workers=workers)) as running:
        count = possible(CONNECTIONS, workers)
        torture(net, [running], (PEER4, PORT), count)
        endings = Counter(line["reason"] for line in running.lines() if line["event"] == "connection")
        # conntrack brings some dials back, which are lines too, and a few clients go past the relay: see docs/relay.md.
        made = WAVES * count + WARMING
        assert 0.9 * made < sum(endings.values()) < 1.2 * made
        assert {"closed", "reset by the client", "reset by the upstream"} <= set(endings), json.dumps(endings)
        assert not [reason for reason in endings if reason.startswith("refused")], json.dumps(endings)


def test_the_kernel_moves(net: Net, tmp_path: Path) -> None:
    """Connections that were chatty first (--accelerate sockmap)."""
    with configured(net, tmp_path, PLAIN.format(workers=2) + "accelerate: sockmap\n") as running:
        count = possible(CONNECTIONS, 2)
        torture(net, [running], (PEER4, PORT), count, ENOUGH)


def test_tls_on_either_side(net: Net) -> None:
    """Two relays, with TLS between them: the one encrypts, the other decrypts."""
    count = possible(CONNECTIONS, 2)
    with relay_net.public_directory() as directory:
        pki = Pki(directory)
        certificate, key = pki.server
        first, second = directory / "first", directory / "second"
        first.mkdir()
        second.mkdir()
        decrypts = DECRYPTS.format(workers=2, peer=PEER4, certificate=certificate, key=key)
        with (
            configured(net, first, ENCRYPTS.format(workers=2, ca=pki.root.path)) as one,
            configured(net, second, decrypts) as other,
        ):
            torture(net, [one, other], (HOST4, ENCRYPTED), count)

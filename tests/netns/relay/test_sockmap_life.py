"""--accelerate sockmap: timeouts, restarts, draining, room, and who may use it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.netns.relay import accelerated as scene
from tests.netns.relay import net as relay_net
from tests.netns.relay.accelerated import BEGUN, LONG, NOTHING, Pair, accelerated, end, ended_with, entries, relaying
from tests.netns.relay.net import Net, Relay, until
from tests.netns.relay.test_operation import scrape
from tpctl.bpf import syscall
from tpctl.relay.connections import sockmap
from tpctl.relay.connections.acceleration import Accelerator, ChattyFlow
from tpctl.relay.connections.pump import PipePool
from tpctl.relay.loop.loop import Loop
from tpctl.system.errors import HostError

pytestmark = pytest.mark.root

apart = scene.apart
running = scene.running


def test_timeouts_see_what_the_kernel_moves(apart: Net, tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_text(TIMEOUTS)
    tmp_path.chmod(0o755)
    over = threading.Event()

    def go_on(pair: Pair) -> int:
        times = 0
        while not over.wait(0.1):
            pair.talk(1)
            times += 1
        return times

    with (
        relay_net.relay(apart, tmp_path, "--config", str(tmp_path / "relay.yaml"), "--access-log") as running,
        ThreadPoolExecutor(1) as talker,
        accelerated(apart) as busy,
    ):
        try:
            talking = talker.submit(go_on, busy)
            with accelerated(apart) as quiet, accelerated(apart) as half:
                end(half.client)
                assert half.server.recv(1) == b""
                for pair in (quiet, half):
                    with pytest.raises(ConnectionResetError):
                        relay_net.read_all(pair.client)
        finally:
            over.set()
        assert talking.result(LONG) > 3
        busy.talk(1)
        busy.client.close()
        busy.server.close()
        assert ended_with(running, quiet)["reason"] == "idle for too long"
        assert ended_with(running, half)["reason"] == "half-closed for too long"
        assert ended_with(running, busy)["reason"] == "closed"


TIMEOUTS = """
accelerate: sockmap
metrics: 127.0.0.1:9902
limits: {connections: 3}
timeouts: {idle: 4s, half_closed: 3s}
listeners: [{listen: "*:15001", direction: outbound}]
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_restart_hands_the_maps_over_and_keeps_connections(apart: Net, workers: str) -> None:
    """The successor has no privileges of its own."""
    with (
        relay_net.public_directory() as directory,
        relaying(apart, directory, "--workers", workers, "--drain-timeout", "60") as running,
    ):
        old = accelerated(apart)
        running.process.send_signal(signal.SIGUSR2)
        successor = int(running.wait_for("handed over")["successor"])
        try:
            # Until they drain, the old workers may still accept what is meant to be the successor's.
            until(lambda: [line["event"] for line in running.lines()].count("draining") == int(workers))
            old.talk(100)
            until(lambda: scrape(apart, 9902).get(BEGUN) == 0)
            with accelerated(apart) as new:
                new.talk(100)
                assert entries(successor) == NOTHING | {"targets": 4, "sources": 4, "streams": 4}
            with old:
                old.talk(1)
            assert running.process.wait(LONG) == 0
            until(lambda: entries(successor) == NOTHING)
        finally:
            os.kill(successor, signal.SIGTERM)
            until(lambda: not relay_net.is_running(successor))


def test_draining_waits_for_connections_and_ends_those_that_stay(apart: Net, tmp_path: Path) -> None:
    with relaying(apart, tmp_path, "--drain-timeout", "6") as running:
        leaves, stays = accelerated(apart), accelerated(apart)
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("draining")
        with leaves:
            leaves.talk(10)
        stays.talk(10)
        assert running.process.wait(LONG) == 0
        with stays, pytest.raises(ConnectionResetError):
            relay_net.read_all(stays.client)
        assert ended_with(running, leaves)["reason"] == "closed"
        assert ended_with(running, stays)["reason"] == "ended by the relay"


def test_without_room_a_connection_stays_as_it_is(apart: Net) -> None:
    maps = sockmap.load(1)
    with apart.listen(apart.host, ("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        for descriptor in maps:
            stack.callback(os.close, descriptor)
        loop = Loop()
        stack.callback(loop.release)
        accelerator = Accelerator(loop, maps, memoryview(bytearray(10)))
        found = []
        for _ in range(2):
            ends = [apart.connect(apart.host, listener.getsockname()), listener.accept()[0]]
            for one in ends:
                stack.enter_context(one)
            up, down = (
                ChattyFlow(source, sink, accelerator.buffer, PipePool(0)) for source, sink in (ends, (ends[1], ends[0]))
            )
            found.append(accelerator.take_over(up, down, lambda: None))
        assert found[0] is not None
        assert found[1] is None
        assert len(list(syscall.keys(maps.streams, 8))) == 2, "of the first one alone"


def test_who_may_not_is_told_so(apart: Net, tmp_path: Path) -> None:
    running = Relay(apart, tmp_path, "--accelerate", "sockmap", prefix=("setpriv", "--reuid=65534", "--clear-groups"))
    assert running.exit_code() == 2
    assert "CAP_BPF" in running.log_text()
    assert "Traceback" not in running.log_text()


def test_an_old_kernel_is_refused() -> None:
    with pytest.raises(HostError, match=r"Linux 6\.1\.0-28-amd64, and it needs 6\.4"):
        sockmap._require_kernel("6.1.0-28-amd64")
    sockmap._require_kernel("6.4.0")
    sockmap._require_kernel("10.0-rc1")


@pytest.mark.parametrize(("connections", "pairs"), [(0, 65536), (5, 5), (10**9, 1 << 20)])
def test_there_is_room_for_the_connections_that_may_be(connections: int, pairs: int) -> None:
    assert sockmap.pairs_for(connections) == pairs

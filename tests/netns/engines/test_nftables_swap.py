"""Policies are swapped while applications open connections without pause: none leaks, none fails, none is cut."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import selectors
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from multiprocessing.connection import Connection as Pipe

import pytest

from tpctl.change import loopback
from tpctl.engines.nftables.engine import NftablesEngine, load
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, PEER, stage
from tpctl.rehearsal.namespaces import Namespace, write_sysctls
from tpctl.spec.policy import Dns, DnsCapture, Family, Inbound, Outbound, Policy, PortRange, VirtualNetwork

pytestmark = pytest.mark.root

SWAPS = int(os.environ.get("TPCTL_SWAPS", "60"))
APP, PROXY = 1000, 65534
PORT = 8080
REMOTES = {socket.AF_INET: "203.0.113.10", socket.AF_INET6: "2001:db8:10::10"}
_ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: no TIME_WAIT, so ports do not run out."""

PLAIN = Policy(PROXY)
FULL = Policy(
    PROXY,
    inbound=Inbound(exclude_ports=(PortRange(22),), exclude_sources=(ip_network("10.0.0.0/8"),)),
    outbound=Outbound(
        exclude_ports=tuple(PortRange(port, port + 3) for port in range(20000, 24000, 8)),
        exclude_destinations=tuple(ip_network(f"10.{a}.{b}.0/24") for a in range(4) for b in range(0, 250, 2)),
    ),
    dns=Dns(DnsCapture.ALL, tcp=True),
    virtual_networks=(VirtualNetwork("br+", ip_network("172.30.0.0/16")),),
    drop_invalid=True,
)
INSERTED = Policy(PROXY, inbound=Inbound(insert=True), outbound=Outbound(insert=True))

_fork = multiprocessing.get_context("fork")


class Process:
    """A child that runs a function in a namespace, and what it hands back when it is told to stop."""

    def __init__(self, space: Namespace, uid: int, work: Callable[[Pipe], object]) -> None:
        self.pipe, theirs = _fork.Pipe()
        self.process = _fork.Process(target=self._main, args=(space, uid, work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "ready"

    @staticmethod
    def _main(space: Namespace, uid: int, work: Callable[[Pipe], object], pipe: Pipe) -> None:
        with space.inside(uid):
            pipe.send(work(pipe))

    def stop(self) -> Counter[str]:
        """Tell it to stop; hands back what it counted."""
        self.pipe.send("stop")
        result: Counter[str] = self.pipe.recv()
        self.process.join(10)
        return result


def serve(name: bytes, port: int) -> Callable[[Pipe], Counter[str]]:
    """Answer every connection, and everything it sends, with a name."""

    def work(pipe: Pipe) -> Counter[str]:
        selector = selectors.DefaultSelector()
        for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((any_address, port))
            listener.listen(4096)
            selector.register(listener, selectors.EVENT_READ, "listener")
        selector.register(pipe, selectors.EVENT_READ, "pipe")
        pipe.send("ready")
        while True:
            for key, _ in selector.select():
                found = key.fileobj
                if key.data == "pipe":
                    return Counter()
                assert isinstance(found, socket.socket)
                if key.data == "listener":
                    with contextlib.suppress(OSError):
                        accepted, _ = found.accept()
                        accepted.setblocking(False)
                        selector.register(accepted, selectors.EVENT_READ, "client")
                    continue
                try:
                    said = found.recv(64)
                    if said:
                        found.send(name)
                except OSError:
                    said = b""
                if not said:
                    selector.unregister(found)
                    found.close()

    return work


def dial(family: socket.AddressFamily) -> socket.socket:
    """A connection to a remote host that answered nothing yet."""
    made = socket.socket(family, socket.SOCK_STREAM)
    made.settimeout(60)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    made.connect((REMOTES[family], PORT))
    return made


def who(connection: socket.socket) -> str:
    """Who is at the other end."""
    connection.send(b"?")
    return connection.recv(1).decode() or "closed"


def applications(family: socket.AddressFamily) -> Callable[[Pipe], Counter[str]]:
    """Open one connection after the other, without pause."""

    def work(pipe: Pipe) -> Counter[str]:
        seen: Counter[str] = Counter()
        pipe.send("ready")
        while not pipe.poll():
            try:
                with dial(family) as made:
                    seen[who(made)] += 1
            except OSError as error:
                seen[f"failed: {error}"] += 1
        return seen

    return work


@contextlib.contextmanager
def scene() -> Iterator[tuple[Lab, list[Process]]]:
    """A laboratory with a data plane on the host ("P") and a real server elsewhere ("R")."""
    with Lab(stage(FULL).layout) as lab:
        for node in (HOST, PEER):
            with lab.inside(node):
                write_sysctls({"ipv4/ip_local_port_range": "1024 65000", "ipv4/tcp_tw_reuse": "1"})
        with lab.inside(HOST):
            loopback.add("lo")
        running = [
            Process(lab.spaces[HOST], PROXY, serve(b"P", 15001)),
            Process(lab.spaces[PEER], 0, serve(b"R", PORT)),
        ]
        try:
            yield lab, running
        finally:
            for process in running:
                process.stop()


def swap(engine: NftablesEngine, policies: tuple[Policy, ...], times: int) -> float:
    """Replace policies in turn; hands back the mean seconds of a swap."""
    plans = [engine.plan(policy) for policy in policies]
    started = time.monotonic()
    for turn in range(times):
        engine.apply(plans[turn % len(plans)])
    return (time.monotonic() - started) / times


@pytest.mark.parametrize("others", [(FULL,), (INSERTED,), (PLAIN,)], ids=["full", "inserted", "same"])
def test_no_connection_leaks_or_fails_while_policies_are_swapped(others: tuple[Policy, ...]) -> None:
    with scene() as (lab, _):
        with lab.inside(HOST):
            engine = load()
            engine.apply(engine.plan(PLAIN))
        with lab.inside(HOST, APP):
            long_lived = [dial(family) for family in REMOTES for _ in range(5)]
            assert {who(connection) for connection in long_lived} == {"P"}
        clients = [Process(lab.spaces[HOST], APP, applications(family)) for family in REMOTES]
        with lab.inside(HOST):
            mean = swap(engine, (*others, PLAIN), SWAPS)
        counted = sum((client.stop() for client in clients), Counter[str]())
        print(f"{SWAPS} swaps, {mean * 1000:.1f} ms each; connections: {dict(counted)}")
        assert {who(connection) for connection in long_lived} == {"P"}
        for connection in long_lived:
            connection.close()
        assert set(counted) == {"P"}, counted
        assert counted["P"] > SWAPS


def test_connections_that_ran_before_an_install_go_on() -> None:
    """On a host whose conntrack was idle, they look new to it."""
    with scene() as (lab, _):
        with lab.inside(HOST, APP):
            direct = [dial(family) for family in REMOTES]
            assert [who(connection) for connection in direct] == ["R", "R"]
        with lab.inside(HOST):
            engine = load()
            engine.apply(engine.plan(FULL))
        assert [who(connection) for connection in direct] == ["R", "R"]
        for connection in direct:
            connection.close()


def test_uninstall_lets_connections_through_the_data_plane_finish() -> None:
    with scene() as (lab, _):
        with lab.inside(HOST):
            engine = load()
            engine.apply(engine.plan(PLAIN))
        with lab.inside(HOST, APP):
            through = [dial(family) for family in REMOTES]
            assert [who(connection) for connection in through] == ["P", "P"]
        with lab.inside(HOST):
            removal = engine.remove()
            assert "2 connections run" in removal.notices[0]
            assert not engine.inspect(None).installed
            assert engine.leftovers() == 2
        assert [who(connection) for connection in through] == ["P", "P"]
        with lab.inside(HOST, APP), dial(socket.AF_INET) as made:
            assert who(made) == "R"
        through[0].close()
        with lab.inside(HOST):
            assert engine.drain_leftovers() == 1
            assert engine.remove(dry_run=True).removed == (
                "nftables: table inet tpctl, left over from an earlier uninstall",
            )
        assert who(through[1]) == "P"
        through[1].close()
        with lab.inside(HOST):
            assert engine.drain_leftovers() == 0
            assert engine.drain_leftovers() is None
            assert engine.nft.objects("list tables")[1:] == []


def test_install_over_leftovers_keeps_their_connections() -> None:
    with scene() as (lab, _):
        with lab.inside(HOST):
            engine = load()
            engine.apply(engine.plan(PLAIN))
        with lab.inside(HOST, APP):
            through = dial(socket.AF_INET)
            assert who(through) == "P"
        with lab.inside(HOST):
            engine.remove()
            plan = engine.plan(FULL)
            assert engine.apply(plan).replaced == ()
            found = engine.inspect(plan)
            assert found.installed
            assert not found.drift
            assert found.families == tuple(map(int, Family))
        assert who(through) == "P"
        through.close()

"""DNS queries go on being answered by the data plane while policies and engines are swapped, each in its zone."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from typing import Any

import pytest

from tests.swap.scene import kept_to, prepared_namespaces
from tests.swap.swaps import AT_LEAST, ENGINES, NFTABLES, Target, between, inside, name
from tests.swap.traffic import ANSWER_SECONDS, APP, PROXY, Child
from tpctl.change import lifecycle, removal
from tpctl.rehearsal.cgroup import own_place
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Dns, DnsCapture, Inbound, NameServer, Outbound, Policy, PortRange

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup")]

_fork = get_context("fork")

SWAPS = int(os.environ.get("TPCTL_SWAPS", "12"))
IPV6_FREEBIND = 78
"""include/uapi/linux/in6.h"""
DATA_PLANE, NAME_SERVER = "D", "N"
SERVERS = {socket.AF_INET: "192.0.2.53", socket.AF_INET6: "2001:db8:53::53"}
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
"""A wildcard socket would answer from another address than the query went to."""

_LISTED = tuple(NameServer(ip_address(address)) for address in SERVERS.values())
POLICIES = (
    Policy(PROXY, dns=Dns(DnsCapture.ALL)),
    Policy(PROXY, dns=Dns(DnsCapture.LISTED, servers=_LISTED), inbound=Inbound(exclude_ports=(PortRange(22),))),
    Policy(
        PROXY,
        dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("192.0.2.54")), *_LISTED)),
        outbound=Outbound(insert=True),
        drop_invalid=True,
    ),
)


def answer(text: str, addresses: dict[socket.AddressFamily, str], port: int) -> Callable[[Pipe], None]:
    """A name server that only ever says `text`."""

    def work(pipe: Pipe) -> None:
        watched: list[socket.socket | int] = [pipe.fileno()]
        for family, address in addresses.items():
            listener = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # it answers for every address, but has few
            listener.bind((address, port))
            watched.append(listener)
        pipe.send("ready")
        while not pipe.poll():
            for ready in select.select(watched, (), ())[0]:
                if isinstance(ready, socket.socket):
                    _, asker = ready.recvfrom(512)
                    ready.sendto(text.encode(), asker)

    return work


def ask(family: socket.AddressFamily, answered: Any) -> Callable[[Pipe], Counter[str]]:
    """One query after the other, each from a socket of its own; `answered` is how many."""

    def work(pipe: Pipe) -> Counter[str]:
        seen: Counter[str] = Counter()
        pipe.send("ready")
        while not pipe.poll():
            with socket.socket(family, socket.SOCK_DGRAM) as made:
                made.settimeout(ANSWER_SECONDS)
                try:
                    made.connect((SERVERS[family], 53))
                    made.send(b"?")
                    seen[made.recv(8).decode()] += 1
                except OSError as error:
                    seen[str(error)] += 1
                answered.value += 1
        return seen

    return work


@contextmanager
def uninstalled_at_the_end(host: Namespace) -> Iterator[None]:
    """Or the record under /run/tpctl would outlive the namespace."""
    try:
        yield
    finally:
        with host.inside():
            removal.uninstall()


def answers(first: Target, targets: list[Target]) -> Counter[str]:
    """Who answered while `first` was replaced by each target."""
    seen: Counter[str] = Counter()
    with own_place() as place, prepared_namespaces() as (host, peer), uninstalled_at_the_end(host):
        with host.inside():
            lifecycle.install(first.policy, kept_to(place, first.options))
        servers = [
            Child(host, PROXY, answer(DATA_PLANE, LOOPBACK, first.policy.dns.port)),
            Child(peer, 0, answer(NAME_SERVER, SERVERS, 53)),
        ]
        answered = [_fork.RawValue(ctypes.c_ulonglong) for _ in SERVERS]
        applications = [Child(host, APP, ask(family, count)) for family, count in zip(SERVERS, answered, strict=True)]
        with host.inside():
            for turn, target in enumerate(targets, 1):
                assert lifecycle.install(target.policy, kept_to(place, target.options)).changed
                _wait_for(AT_LEAST * turn, answered)
        for child in (*applications, *servers):
            child.pipe.send("stop")
            seen += child.result() or Counter()
    return seen


def _wait_for(queries: int, answered: Sequence[Any]) -> None:
    deadline = time.monotonic() + 2 * ANSWER_SECONDS
    while sum(count.value for count in answered) < queries:
        assert time.monotonic() < deadline, f"fewer than {queries} queries"
        time.sleep(0.001)


def flawless(seen: Counter[str]) -> None:
    """The data plane answered every query, and there were enough."""
    assert set(seen) == {DATA_PLANE}, seen
    assert seen[DATA_PLANE] >= AT_LEAST * SWAPS


@pytest.mark.parametrize("options", ENGINES, ids=name)
def test_queries_during_swaps_inside_an_engine(options: EngineOptions) -> None:
    flawless(answers(Target(POLICIES[0], options), inside(options, SWAPS, POLICIES)))


@pytest.mark.needs("ebpf", "legacy")
def test_queries_during_swaps_between_engines() -> None:
    flawless(answers(Target(POLICIES[0], NFTABLES), between(SWAPS, POLICIES)))

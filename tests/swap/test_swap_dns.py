"""DNS queries go on being answered by the data plane while policies and engines are swapped, each in its zone."""

from __future__ import annotations

import os
import select
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from multiprocessing.connection import Connection as Pipe

import pytest

from agent import lifecycle
from agent.engine_options import EngineOptions
from agent.policy import Dns, DnsCapture, Inbound, NameServer, Outbound, Policy, PortRange
from agent.rehearsal.cgroup import own_place
from agent.rehearsal.namespaces import Namespace
from tests.swap.scene import kept_to, prepared_namespaces
from tests.swap.swaps import ENGINES, NFTABLES, Target, between, inside, name
from tests.swap.traffic import APP, PROXY, Child

pytestmark = pytest.mark.root

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


def ask(family: socket.AddressFamily) -> Callable[[Pipe], Counter[str]]:
    """One query after the other, each from a socket of its own."""

    def work(pipe: Pipe) -> Counter[str]:
        seen: Counter[str] = Counter()
        pipe.send("ready")
        while not pipe.poll():
            with socket.socket(family, socket.SOCK_DGRAM) as made:
                made.settimeout(2)
                try:
                    made.connect((SERVERS[family], 53))
                    made.send(b"?")
                    seen[made.recv(8).decode()] += 1
                except OSError as error:
                    seen[str(error)] += 1
        return seen

    return work


@contextmanager
def uninstalled_at_the_end(host: Namespace) -> Iterator[None]:
    """Or the record under /run/tpctl would outlive the namespace."""
    try:
        yield
    finally:
        with host.inside():
            lifecycle.uninstall()


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
        applications = [Child(host, APP, ask(family)) for family in SERVERS]
        with host.inside():
            for target in targets:
                assert lifecycle.install(target.policy, kept_to(place, target.options)).changed
        for child in (*applications, *servers):
            child.pipe.send("stop")
            seen += child.result() or Counter()
    return seen


def flawless(seen: Counter[str]) -> None:
    """The data plane answered every query, and there were enough."""
    assert set(seen) == {DATA_PLANE}, seen
    assert seen[DATA_PLANE] >= 20 * SWAPS


@pytest.mark.parametrize("options", ENGINES, ids=name)
def test_queries_during_swaps_inside_an_engine(options: EngineOptions) -> None:
    flawless(answers(Target(POLICIES[0], options), inside(options, SWAPS, POLICIES)))


def test_queries_during_swaps_between_engines() -> None:
    flawless(answers(Target(POLICIES[0], NFTABLES), between(SWAPS, POLICIES)))

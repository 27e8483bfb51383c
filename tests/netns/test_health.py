"""What status says of the data plane's sockets, beside what becomes of real connections."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.hidden import anybodys_python
from tests.netns import lab
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, PEER, RELAY_UID, Net
from tpctl.change import health
from tpctl.engines.base import Engine
from tpctl.host import cgroups
from tpctl.record import state
from tpctl.rehearsal.cgroup import own_place
from tpctl.spec.policy import Dns, DnsCapture, Inbound, NameServer, Outbound, Policy, Protocol, Redirection

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
FAMILIES = (socket.AF_INET, socket.AF_INET6)
PORT = 8080
LOST_SECONDS = 1.0
POLICY = Policy(RELAY_UID)
IN, OUT = 15006, 15001
LISTENING = """
import json, socket, sys
held = []
print("begun", flush=True)
sys.stdin.readline()
for address, port, v6only, backlog, udp, transparent in json.loads(sys.argv[1]):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)[:1 + udp]:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        if ":" in address:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        if transparent:
            made.setsockopt(socket.SOL_IP, 19, 1)
        if kind is socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        if kind is socket.SOCK_STREAM:
            made.listen(backlog)
        held.append(made)
print("listening", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Bound:
    """An address that a socket is bound to on both ports, or on one of them; with `udp`, another one of that beside."""

    address: str
    v6only: bool = False
    ports: tuple[int, ...] = (IN, OUT)
    backlog: int = 100
    udp: bool = False
    transparent: bool = False


@contextmanager
def data_plane(net: Net, *sockets: Bound, uid: int = RELAY_UID, cgroup: Path | None = None) -> Iterator[int]:
    """A process of a user that listens, and accepts nothing; hands back its number. `cgroup` is to be its directory."""
    wanted = [
        (one.address, port, int(one.v6only), one.backlog, int(one.udp), one.transparent)
        for one in sockets
        for port in one.ports
    ]
    python, environment = anybodys_python()
    with net.inside(net.host):
        process = subprocess.Popen(
            [python, "-c", LISTENING, json.dumps(wanted)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=uid, cwd="/",
        )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "begun\n"
        if cgroup:
            (cgroup / "cgroup.procs").write_text(str(process.pid))
        process.stdin.write("listen\n")
        process.stdin.flush()
        assert process.stdout.readline() == "listening\n"
        try:
            yield process.pid
        finally:
            process.communicate("")


@contextmanager
def installed(engine: tuple[str, ...]) -> Iterator[Net]:
    with relay_net.network(redirect=False, passthrough6=False) as network:
        with network.inside(network.host):
            lab.tpctl("install", "--kuma-dp-user", relay_net.RELAY_USER, *engine, "--exclude-outbound-ports", "22")
        yield network
        with network.inside(network.host):
            lab.tpctl("uninstall")


@pytest.fixture(scope="module", params=ENGINES)
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    with installed(ENGINES[request.param]) as network:
        yield network


def arrives(net: Net, node: str, to: str, family: socket.AddressFamily, within: float = relay_net.TIMEOUT) -> bool:
    with net.inside(node):
        dialler = socket.socket(family, socket.SOCK_STREAM)
    with dialler:
        dialler.settimeout(within)
        try:
            dialler.connect((to, PORT))
        except (ConnectionRefusedError, TimeoutError):
            return False
        return True


ARRANGEMENTS = pytest.mark.parametrize(
    "sockets",
    [
        (Bound("::"),),
        (Bound("::", v6only=True),),
        (Bound("0.0.0.0"),),
        (Bound("0.0.0.0"), Bound("::", v6only=True)),
        (Bound("127.0.0.1"), Bound("::1")),
        (Bound("127.0.0.1", ports=(OUT,)), Bound("::1", ports=(OUT,)), Bound("::", ports=(IN,))),
        (Bound("::ffff:127.0.0.1", ports=(OUT,)), Bound("::", ports=(IN,))),
        (Bound("10.99.0.2"), Bound("fd99::2")),
        (Bound("::1", v6only=True), Bound("0.0.0.0")),
        (),
    ],
    ids=lambda bound: " ".join(f"{one.address}{'!' * one.v6only}" for one in bound) or "none",
)


@ARRANGEMENTS
def test_a_port_is_well_if_every_connection_to_it_arrives(net: Net, sockets: tuple[Bound, ...]) -> None:
    with data_plane(net, *sockets):
        compare(arrivals(net), said(net))


ENGINE_OF: dict[str, Engine[Any]] = {}
"""By the host's name."""


def known(net: Net) -> frozenset[int] | None:
    with net.inside(net.host):
        return ENGINE_OF[net.host].inspect(None).registered


@pytest.fixture(scope="module")
def programs() -> Iterator[Net]:
    """With eBPF programs on a control group that has nobody in it but this process and its children."""
    with own_place() as place, relay_net.network(redirect=False) as network:
        with network.inside(network.host):
            engine = place.engine()
            engine.apply(engine.plan(POLICY))
        ENGINE_OF[network.host] = engine
        yield network
        with network.inside(network.host):
            engine.remove(draining=False)


@ARRANGEMENTS
@pytest.mark.needs("ebpf")
def test_a_port_is_well_if_every_connection_to_it_arrives_by_ebpf(programs: Net, sockets: tuple[Bound, ...]) -> None:
    with data_plane(programs, *sockets):
        with programs.inside(programs.host):
            ports = health.port_statuses(POLICY, "ebpf", known(programs))
            found = {(one.port, one.protocol): one.problem for one in ports}
        compare(arrivals(programs), found)


@pytest.mark.needs("ebpf")
def test_a_socket_that_the_programs_do_not_know(programs: Net) -> None:
    """Of a data plane in a control group to which they are not attached."""
    everywhere = cgroups.root()
    with data_plane(programs, Bound("::"), cgroup=everywhere), programs.inside(programs.host):
        found = {one.port: one.problem for one in health.port_statuses(POLICY, "ebpf", known(programs))}
        assert not arrives(programs, programs.peer, HOST[socket.AF_INET], socket.AF_INET)
        assert "the eBPF programs do not know its socket" in str(found[IN])
        assert found[OUT] is None
    with data_plane(programs, Bound("::")), programs.inside(programs.host):
        assert not any(one.problem for one in health.port_statuses(POLICY, "ebpf", known(programs)))


def arrivals(net: Net) -> dict[int, dict[socket.AddressFamily, bool]]:
    """By the port where it lands: whether a connection of each family arrives."""
    return {
        OUT: {family: arrives(net, net.host, PEER[family], family) for family in FAMILIES},
        IN: {family: arrives(net, net.peer, HOST[family], family) for family in FAMILIES},
    }


def compare(
    arrived: dict[int, dict[socket.AddressFamily, bool]], problems: dict[tuple[int, Protocol], str | None]
) -> None:
    for port, outcomes in arrived.items():
        problem = problems[(port, Protocol.TCP)]
        assert (problem is None) == all(outcomes.values()), problem
        if problem and any(outcomes.values()):  # it names the family that nobody takes, and no other
            lost = {number for family, number in zip(FAMILIES, (4, 6), strict=True) if not outcomes[family]}
            assert {number for number in (4, 6) if f"IPv{number} connections" in problem} == lost


def said(net: Net, policy: Policy | None = None) -> dict[tuple[int, Protocol], str | None]:
    """What is wrong with each port, by the policy on record or another."""
    with net.inside(net.host):
        record = state.load()
        assert record is not None
        found = health.port_statuses(policy or record.policy, record.options.engine)
    return {(one.port, one.protocol): one.problem for one in found}


def status(net: Net) -> tuple[int, dict[str, Any]]:
    """The exit code of `tpctl status`, and what it reports."""
    with net.inside(net.host):
        done = lab.tpctl("status", "--json", check=False)
    return done.returncode, json.loads(done.stdout)


def test_status_ends_with_what_is_wrong(net: Net) -> None:
    with data_plane(net, Bound("::")):
        code, report = status(net)
        assert (code, report["problems"], report["warnings"]) == (0, [], [])
        assert [(port["uids"], port["boundTo"]) for port in report["ports"]] == [([RELAY_UID], ["[::]"])] * 2
    with data_plane(net, Bound("0.0.0.0")):
        code, report = status(net)
    assert code == 3
    assert [problem.partition(":")[0] for problem in report["problems"]] == [
        f"what listens on tcp port {port} is bound to 0.0.0.0 (IPv4 only), and does not take {whose}"
        for port, whose in (
            ("15006 (inbound)", "IPv6 connections from other hosts"),
            ("15001 (outbound)", "IPv6 connections of this host"),
        )
    ]


@pytest.fixture(scope="module")
def alone() -> Iterator[Net]:
    """With one engine: what is tested is the same for all."""
    with installed(ENGINES["nftables"]) as network:
        yield network


def test_a_listener_of_somebody_else(alone: Net) -> None:
    with data_plane(alone, Bound("::"), uid=1000):
        assert all("runs as uid 1000, not as the data plane user" in str(problem) for problem in said(alone).values())


def test_somebody_else_beside_the_data_plane_counts_only_where_connections_land(alone: Net) -> None:
    here, elsewhere = Bound("127.0.0.1", ports=(OUT,)), Bound(HOST[socket.AF_INET], ports=(OUT,))
    six = Bound("::1", ports=(OUT,))
    with data_plane(alone, here, six), data_plane(alone, elsewhere, uid=1000):
        assert said(alone)[(OUT, Protocol.TCP)] is None
    with data_plane(alone, elsewhere, six), data_plane(alone, here, uid=1000):
        assert "runs as uid 1000" in str(said(alone)[(OUT, Protocol.TCP)])


def test_a_socket_is_of_those_who_use_it(alone: Net) -> None:
    """It was made by root, as systemd does for a service, and by then the data plane's user holds it, too."""
    with alone.inside(alone.host):
        made = [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True) for port in (IN, OUT)]
    with made[0], made[1]:
        assert all("runs as uid 0" in str(problem) for problem in said(alone).values())
        with held_by_the_data_plane(*made):
            assert set(said(alone).values()) == {None}


@contextmanager
def held_by_the_data_plane(*sockets: socket.socket) -> Iterator[None]:
    """A process of the data plane's user has got these, and does nothing with them."""
    argv = ["setpriv", f"--reuid={RELAY_UID}", "--clear-groups", "sh", "-c", "echo ready; read _"]
    numbers = [one.fileno() for one in sockets]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=numbers) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.communicate("")


def test_a_socket_that_is_bound_to_an_interface(alone: Net) -> None:
    """What this host opens arrives on lo, what others open does not."""
    for device, right, wrong in ((b"eth0", IN, OUT), (b"lo", OUT, IN)):
        with data_plane(alone, Bound("::", ports=(right,))), alone.inside(alone.host):
            made = socket.socket(socket.AF_INET6)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
            made.bind(("::", wrong))
            made.listen()
            with made:
                assert f"[::] (interface {device.decode()} only), and does not take" in str(
                    said(alone)[(wrong, Protocol.TCP)]
                )


def test_a_data_plane_that_does_not_accept(alone: Net) -> None:
    family = socket.AF_INET
    with data_plane(alone, Bound("::", backlog=1)), ExitStack() as stack:
        for _ in range(3):  # the kernel lets one more wait than that, and answers the next one's SYN no more
            with alone.inside(alone.peer):
                dialler = stack.enter_context(socket.socket(family))
            dialler.setblocking(False)
            dialler.connect_ex((HOST[family], PORT))
        relay_net.until(lambda: "is full: the data plane does not accept" in str(said(alone)[(IN, Protocol.TCP)]))
        assert said(alone)[(OUT, Protocol.TCP)] is None


def test_a_data_plane_that_is_stopped(alone: Net) -> None:
    with data_plane(alone, Bound("::")) as process:
        os.kill(process, signal.SIGSTOP)
        try:
            relay_net.until(lambda: "is stopped" in str(said(alone)[(IN, Protocol.TCP)]))
            assert f"(process {process})" in str(said(alone)[(OUT, Protocol.TCP)])
        finally:
            os.kill(process, signal.SIGCONT)
        relay_net.until(lambda: said(alone)[(IN, Protocol.TCP)] is None)


@pytest.mark.needs("tproxy")
def test_tproxy_needs_a_transparent_socket(alone: Net) -> None:
    policy = Policy(RELAY_UID, inbound=Inbound(mode=Redirection.TPROXY), outbound=Outbound(enabled=False))
    with data_plane(alone, Bound("::")):
        problem = said(alone, policy)[(IN, Protocol.TCP)]
        assert "its socket needs IP_TRANSPARENT" in str(problem)
    with data_plane(alone, Bound("::", transparent=True), uid=0):
        assert "runs as uid 0" in str(said(alone, policy)[(IN, Protocol.TCP)])


def test_dns_lands_in_the_families_that_are_captured(alone: Net) -> None:
    dns = Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("192.0.2.53")),), tcp=True)
    policy = Policy(RELAY_UID, inbound=Inbound(enabled=False), outbound=Outbound(enabled=False), dns=dns)
    with data_plane(alone, Bound("127.0.0.1", ports=(15053,), udp=True)):
        assert said(alone, policy) == {(15053, Protocol.UDP): None, (15053, Protocol.TCP): None}
        both = replace(policy, dns=replace(dns, capture=DnsCapture.ALL))
        assert all("IPv6 DNS queries of this host" in str(problem) for problem in said(alone, both).values())


def test_answers_of_a_dns_socket_that_somebody_else_has_made_are_lost(alone: Net) -> None:
    """Conntrack zones tell them by who made the socket, whoever uses it now."""
    dns = Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("192.0.2.53")),))
    policy = Policy(RELAY_UID, inbound=Inbound(enabled=False), outbound=Outbound(enabled=False), dns=dns)
    with alone.inside(alone.host):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("127.0.0.1", 15053))
    with made, held_by_the_data_plane(made):
        assert "was made by uid 0" in str(said(alone, policy)[(15053, Protocol.UDP)])
        whole = replace(policy, dns=replace(dns, split_zones=False))
        assert said(alone, whole)[(15053, Protocol.UDP)] is None

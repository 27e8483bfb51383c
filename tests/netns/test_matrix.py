"""Who answers: the default install's matrix, written out by hand, and many policies against the specification."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from tests.netns.lab import APP, PROXY, ROOT, installed, run
from tpctl.change import loopback
from tpctl.engines.registry import select
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, PEER_ADDRESS, Layout, stage
from tpctl.rehearsal.probes import probes
from tpctl.rehearsal.rehearse import attempt, rehearse
from tpctl.spec.connection import Connection
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import (
    ALL_PORTS,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

pytestmark = pytest.mark.root

LAYOUT = Layout()
REMOTE = {Family.IPV4: ip_address("203.0.113.7"), Family.IPV6: ip_address("2001:db8:7::7")}
LOCAL = {Family.IPV4: ip_address("127.0.0.1"), Family.IPV6: ip_address("::1")}
PASSTHROUGH = {Family.IPV4: ip_address("127.0.0.6"), Family.IPV6: ip_address("::6")}
IN, OUT = "host:15006", "host:15001"


def arrive(family: Family, port: int, protocol: str = "tcp") -> Connection:
    return LAYOUT.arriving(REMOTE[family], HOST_ADDRESS[family], protocol, port)


def leave(family: Family, port: int, uid: int, protocol: str = "tcp") -> Connection:
    return LAYOUT.outgoing(protocol, REMOTE[family], port, uid)


def to_self(family: Family, uid: int, address: str | None = None) -> Connection:
    return LAYOUT.outgoing("tcp", ip_address(address) if address else HOST_ADDRESS[family], 8080, uid)


def passthrough(family: Family) -> Connection:
    return dataclasses.replace(to_self(family, PROXY), source=PASSTHROUGH[family])


def matrix(family: Family) -> dict[str, tuple[Connection, str]]:
    """The rows of docs/ruleset.md's matrix for `--exclude-inbound-ports 22`: what connects, and who answers."""
    local = str(LOCAL[family])
    rows = {
        "peer to host:8080": (arrive(family, 8080), IN),
        "peer to the excluded host:22": (arrive(family, 22), "host:22"),
        "peer to the inbound listener itself": (arrive(family, 15006), "refused"),
        "peer to the outbound listener itself": (arrive(family, 15001), "refused"),
        "peer to host udp": (arrive(family, 8080, "udp"), "host:8080"),
        "app to remote": (leave(family, 443, APP), OUT),
        "root to remote": (leave(family, 443, ROOT), OUT),
        "proxy to remote": (leave(family, 443, PROXY), "peer:443"),
        "app to the loopback address": (to_self(family, APP, local), "host:8080"),
        "app to the own address": (to_self(family, APP), "host:8080"),
        "proxy to the loopback address": (to_self(family, PROXY, local), "host:8080"),
        "proxy to the own address": (to_self(family, PROXY), IN),
        "proxy from the passthrough address": (passthrough(family), "host:8080"),
        "app to remote udp": (leave(family, 443, APP, "udp"), "peer:443"),
        "app dns udp, DNS off": (leave(family, 53, APP, "udp"), "peer:53"),
        "app dns tcp, DNS off": (leave(family, 53, APP), OUT),
    }
    if family is Family.IPV4:
        rows["app to 127.0.0.2"] = (to_self(family, APP, "127.0.0.2"), "host:8080")
        rows["proxy to 127.0.0.2"] = (to_self(family, PROXY, "127.0.0.2"), IN)
    return rows


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(LAYOUT) as made:
        yield made


def answers(lab: Lab, rows: dict[str, tuple[Connection, str]]) -> dict[str, str]:
    for connection, _ in rows.values():
        lab.serve(connection)
    return {name: str(lab.dial(connection)) for name, (connection, _) in rows.items()}


def nobody_in_between(rows: dict[str, tuple[Connection, str]]) -> dict[str, str]:
    """Who answers on a host without redirection."""
    return {
        name: f"{LAYOUT.locate(connection.destination)}:{connection.destination_port}"
        for name, (connection, _) in rows.items()
    }


@pytest.mark.parametrize("family", Family)
def test_default_install(lab: Lab, variant: str, family: Family) -> None:
    rows = matrix(family)
    lab.serve_data_plane(Policy(PROXY))
    direct = {name: row for name, row in rows.items() if "passthrough" not in name or family is Family.IPV4}
    assert answers(lab, direct) == nobody_in_between(direct)
    with installed(lab, "--exclude-inbound-ports", "22", "--engine", "iptables", "--iptables-mode", variant):
        assert answers(lab, rows) == {name: expected for name, (_, expected) in rows.items()}
    assert answers(lab, direct) == nobody_in_between(direct)


@pytest.mark.parametrize("family", Family)
def test_original_destination_is_recovered(lab: Lab, variant: str, family: Family) -> None:
    lab.serve_data_plane(Policy(PROXY))
    with installed(lab, "--engine", "iptables", "--iptables-mode", variant):
        assert lab.dial(arrive(family, 8080)).original == (HOST_ADDRESS[family], 8080)
        assert lab.dial(leave(family, 443, APP)).original == (REMOTE[family], 443)
        assert lab.dial(arrive(family, 8080)).source == REMOTE[family]


def test_nobody_listens_on_the_data_plane_ports(lab: Lab, variant: str) -> None:
    with installed(lab, "--engine", "iptables", "--iptables-mode", variant):
        for family in Family:
            assert lab.dial(arrive(family, 8080)).outcome == "refused"
            assert lab.dial(leave(family, 443, APP)).outcome == "refused"


def test_ipv6_is_left_alone_when_only_ipv4_is_asked_for(lab: Lab, variant: str) -> None:
    rows = matrix(Family.IPV6)
    del rows["proxy from the passthrough address"]
    lab.serve_data_plane(Policy(PROXY))
    with installed(lab, "--engine", "iptables", "--iptables-mode", variant, "--ip-family-mode", "ipv4"):
        assert answers(lab, rows) == nobody_in_between(rows)
        assert str(lab.dial(leave(Family.IPV4, 443, APP))) == OUT


@pytest.mark.parametrize("family", Family)
def test_running_connections_survive_install_and_uninstall(lab: Lab, variant: str, family: Family) -> None:
    """Where conntrack was idle, mid-stream segments look new, and must not be redirected (kumactl's defect 2)."""
    with lab.inside(HOST):
        server = socket.create_server((str(HOST_ADDRESS[family]), 8080), family=_af(family))
    with lab.inside(PEER):
        far = socket.create_server((str(PEER_ADDRESS[family]), 443), family=_af(family))
        client = socket.create_connection((str(HOST_ADDRESS[family]), 8080), timeout=60)
    with lab.inside(HOST, APP):
        app = socket.create_connection((str(PEER_ADDRESS[family]), 443), timeout=60)
    with server, far, client, app, server.accept()[0] as accepted, far.accept()[0] as far_accepted:
        pairs = [(client, accepted), (accepted, client), (app, far_accepted), (far_accepted, app)]
        with installed(lab, "--engine", "iptables", "--iptables-mode", variant):
            _exchange(pairs)
        _exchange(pairs)


def _af(family: Family) -> socket.AddressFamily:
    return socket.AF_INET if family is Family.IPV4 else socket.AF_INET6


def _exchange(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    for sender, receiver in pairs:
        sender.sendall(b"still here")
        receiver.settimeout(60)
        assert receiver.recv(64) == b"still here"


SERVERS = (
    NameServer(ip_address("10.0.0.53")),
    NameServer(ip_address("127.0.0.53")),
    NameServer(ip_address("2001:db8::53")),
)
LISTED = Dns(DnsCapture.LISTED, servers=SERVERS)
VNETS = (
    VirtualNetwork("br+", ip_network("172.30.0.0/16")),
    VirtualNetwork("docker0", ip_network("10.44.0.0/24")),
    VirtualNetwork("docker0", ip_network("fd44::/64")),
)
EXCLUDED_UIDS = (
    UidExclusion(Protocol.TCP, (PortRange(7000, 8000), PortRange(53)), UidRange(2000, 2002)),
    UidExclusion(Protocol.UDP, (ALL_PORTS,), UidRange(2005)),
    UidExclusion(Protocol.TCP, (ALL_PORTS,), UidRange(2**31 + 7)),
)

POLICIES = {
    "dns listed": Policy(PROXY, dns=LISTED),
    "dns listed, one family": Policy(PROXY, dns=dataclasses.replace(LISTED, servers=SERVERS[:1])),
    "dns all": Policy(PROXY, dns=Dns(DnsCapture.ALL)),
    "dns listed, tcp": Policy(PROXY, dns=dataclasses.replace(LISTED, tcp=True)),
    "dns all, tcp": Policy(PROXY, dns=Dns(DnsCapture.ALL, tcp=True)),
    "dns without zones": Policy(PROXY, dns=dataclasses.replace(LISTED, split_zones=False)),
    "include lists": Policy(
        PROXY,
        inbound=Inbound(include_ports=(PortRange(8080), PortRange(9000, 9010)), exclude_ports=(PortRange(9005),)),
        outbound=Outbound(include_ports=(PortRange(443), PortRange(6000, 6010)), exclude_ports=(PortRange(443),)),
    ),
    "more than 15 ports": Policy(
        PROXY,
        inbound=Inbound(exclude_ports=tuple(PortRange(1000 + 10 * n) for n in range(16))),
        outbound=Outbound(exclude_ports=tuple(PortRange(2000 + 10 * n, 2004 + 10 * n) for n in range(16))),
    ),
    "insert": Policy(PROXY, inbound=Inbound(insert=True), outbound=Outbound(insert=True), dns=LISTED),
    "insert, virtual networks, dns all": Policy(
        PROXY,
        inbound=Inbound(insert=True),
        outbound=Outbound(insert=True),
        dns=Dns(DnsCapture.ALL),
        virtual_networks=VNETS,
    ),
    "virtual networks": Policy(PROXY, virtual_networks=VNETS),
    "virtual networks, dns listed": Policy(PROXY, dns=LISTED, virtual_networks=VNETS),
    "virtual networks, dns all, tcp": Policy(PROXY, dns=Dns(DnsCapture.ALL, tcp=True), virtual_networks=VNETS),
    "outbound off": Policy(PROXY, outbound=Outbound(enabled=False), dns=LISTED),
    "inbound off": Policy(PROXY, inbound=Inbound(enabled=False)),
    "exclusions": Policy(
        PROXY,
        inbound=Inbound(exclude_sources=(ip_network("10.1.0.0/16"), ip_network("2001:db8:1::/48"))),
        outbound=Outbound(
            exclude_destinations=(ip_network("10.9.0.0/16"), ip_network("2001:db8:9::/48")),
            exclude_uids=EXCLUDED_UIDS,
        ),
        dns=LISTED,
    ),
    "a server is excluded": Policy(
        PROXY, outbound=Outbound(exclude_destinations=(ip_network("10.0.0.53/32"),)), dns=LISTED
    ),
    "the data plane is root": Policy(ROOT, dns=LISTED),
    "other ports": Policy(PROXY, inbound=Inbound(port=16), outbound=Outbound(port=17), dns=Dns(DnsCapture.ALL, 18)),
    "log and drop invalid": Policy(PROXY, drop_invalid=True, log_level=7, dns=LISTED, virtual_networks=VNETS),
    "IPv6 alone": Policy(PROXY, families=frozenset({Family.IPV6}), dns=LISTED),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_end_where_the_specification_says(name: str, variant: str) -> None:
    rehearsal = rehearse(POLICIES[name], EngineOptions("iptables", iptables_mode=variant))
    wrong = [
        f"{result.probe.label}: {result.probe.connection}\n    expected {result.expected} ({result.verdict.reason}), "
        f"got {result.answer}, original destination {result.answer.original}"
        for result in rehearsal.results
        if not result.ok
    ]
    assert not wrong, "\n".join(wrong)
    assert not [note for note in rehearsal.notes if "not rehearsed" in note]


def carry_out(lab: Lab, policy: Policy, variant: str) -> None:
    """Install without the command line, which would look at the machine's resolv.conf and users."""
    with lab.inside(HOST):
        engine = select(EngineOptions("iptables", iptables_mode=variant)).engine
        loopback.add(policy.loopback)
        engine.apply(engine.plan(policy))
    lab.serve_data_plane(policy)


def on_host(lab: Lab, variant: str, rule: str) -> None:
    """Add somebody else's rule of both families."""
    with lab.inside(HOST):
        for tool in ("iptables", "ip6tables"):
            run([f"{tool}-{variant}", *rule.split()])


@pytest.mark.parametrize("name", ["dns listed", "dns all", "a server is excluded", "exclusions"])
def test_answers_pass_a_stateful_firewall(name: str, variant: str) -> None:
    """An answer must be in the conntrack zone of its query, or it is NEW to a firewall of the host, and dropped."""
    staging = stage(POLICIES[name])
    with Lab(staging.layout) as lab:
        carry_out(lab, staging.policy, variant)
        on_host(lab, variant, "-A INPUT -p udp --sport 53 -m conntrack --ctstate NEW -j DROP")
        wanted = [probe for probe in probes(staging.policy, staging.layout) if probe.connection.protocol == "udp"]
        wrong = [f"{r.probe} got {r.answer}" for r in attempt(lab, staging.policy, wanted) if not r.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["dns listed", "dns all"])
def test_masqueraded_queries_of_others_are_answered(name: str, variant: str) -> None:
    """Containers that are no virtual network of the policy: their query and its answer are in one zone, too."""
    policy = POLICIES[name]
    layout = stage(dataclasses.replace(policy, virtual_networks=VNETS[1:])).layout
    with Lab(layout) as lab:
        carry_out(lab, policy, variant)
        on_host(lab, variant, "-t nat -A POSTROUTING -o eth0 -j MASQUERADE")
        for network, server in (VNETS[1].network, SERVERS[0]), (VNETS[2].network, SERVERS[2]):
            query = layout.arriving(network[2], server.address, "udp", 53)
            lab.serve(query)
            answer = lab.dial(query)
            assert str(answer) == "peer:53"
            assert answer.source == HOST_ADDRESS[query.family]


def test_scoped_name_server(variant: str) -> None:
    policy = Policy(PROXY, dns=Dns(DnsCapture.LISTED, servers=(NameServer(ip_address("fe80::53"), "eth0"),)))
    assert rehearse(policy, EngineOptions("iptables", iptables_mode=variant)).ok


def test_invalid_packets_are_dropped(lab: Lab, variant: str) -> None:
    """A reset out of nowhere is INVALID to conntrack; it counts at a foreign rule behind ours only when it passes."""
    with lab.inside(HOST):
        run([f"iptables-{variant}", "-t", "mangle", "-A", "INPUT", "-p", "tcp", "--dport", "4711"])
    for flags, passed_so_far in (((), 1), (("--drop-invalid-packets",), 1)):
        with installed(lab, "--engine", "iptables", "--iptables-mode", variant, *flags):
            _send_stray_reset(lab, 4711)
            assert lab.dial(arrive(Family.IPV4, 8080)).outcome == "refused", "what was sent before has arrived, too"
            with lab.inside(HOST):
                shown = run([f"iptables-{variant}-save", "-c", "-t", "mangle"]).stdout
        (line,) = [line for line in shown.splitlines() if "-A INPUT" in line]
        assert line.startswith(f"[{passed_so_far}:"), shown


def _send_stray_reset(lab: Lab, port: int) -> None:
    import struct

    host, peer = HOST_ADDRESS[Family.IPV4].packed, PEER_ADDRESS[Family.IPV4].packed
    header = struct.pack("!HHIIBBHHH", 1234, port, 1, 0, 5 << 4, 0x04, 0, 0, 0)
    words = struct.unpack("!16H", peer + host + struct.pack("!BBH", 0, 6, len(header)) + header)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    with lab.inside(PEER):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    with raw:
        raw.sendto(header[:16] + struct.pack("!H", total) + header[18:], (str(HOST_ADDRESS[Family.IPV4]), 0))

"""The place of our jumps among the rules of others: by what becomes of connections, and what the engine says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network

import pytest

from tests.netns.lab import APP, PROXY, PROXY_USER, run, tpctl
from tpctl.engines.base import Inspection
from tpctl.engines.iptables.engine import select
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER_ADDRESS, Bridge, Layout
from tpctl.rehearsal.sockets import Seat
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Dns, DnsCapture, Family, Inbound, Outbound, Policy, PortRange, Protocol

pytestmark = pytest.mark.root

BRIDGE = Bridge("docker0", (ip_network("172.17.0.0/16"),))
CONTAINER = Seat(BRIDGE.name, 80)
INBOUND, OUTBOUND = Seat(HOST, 15006), Seat(HOST, 15001)
REMOTE = ip_address("203.0.113.10")
PLAIN, CAPTURING = Policy(PROXY), Policy(PROXY, dns=Dns(DnsCapture.ALL))
PUBLISHED, OWN = 8080, 9000

DOCKER = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""
"""As Docker 20 to 28 install them."""
GONE = """*nat
-D PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-D OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-D POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-F DOCKER
-X DOCKER
COMMIT
"""
KUBERNETES = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-1 - [0:0]
:KUBE-SEP-1 - [0:0]
-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "a service" -m tcp --dport 443 -j KUBE-SVC-1
-A KUBE-SVC-1 -j KUBE-SEP-1
-A KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""


class Scene:
    """A host with a container behind a bridge, whose rules are of one variant of iptables."""

    def __init__(self, lab: Lab, variant: str) -> None:
        self.lab = lab
        self.variant = variant
        self.engine = select(EngineOptions(engine="iptables", iptables_mode=variant))
        self.plan = self.engine.plan(PLAIN)

    def restore(self, text: str) -> None:
        """Change the host's rules as other software does."""
        with self.lab.inside(HOST):
            run([f"iptables-{self.variant}-restore", "--noflush"], stdin=text)

    def rule(self, *words: str, table: str = "nat") -> None:
        """One change, as an administrator makes it."""
        with self.lab.inside(HOST):
            run([f"iptables-{self.variant}", "-t", table, *words])

    def saved(self) -> str:
        """The host's rules."""
        with self.lab.inside(HOST):
            return run([f"iptables-{self.variant}-save"]).stdout

    def install(self, policy: Policy) -> str:
        """Install; hands back what was said."""
        with self.lab.inside(HOST):
            self.plan = self.engine.plan(policy)
            return "\n".join(self.engine.apply(self.plan).notices)

    def repair(self) -> None:
        """Install the same again."""
        with self.lab.inside(HOST):
            self.engine.apply(self.plan)

    def inspect(self) -> Inspection:
        """What there is, beside what should be."""
        with self.lab.inside(HOST):
            return self.engine.inspect(self.plan)

    def drift(self) -> str:
        """The drift that is told, as one text."""
        return "\n".join(self.inspect().drift)

    def arriving(self, port: int) -> Seat | None:
        """Where a connection from the peer to the host ends."""
        source, target = PEER_ADDRESS[Family.IPV4], HOST_ADDRESS[Family.IPV4]
        return self.lab.dial(self.lab.layout.arriving(source, target, Protocol.TCP, port)).seat

    def leaving(self, port: int) -> Seat | None:
        """Where an application's connection to another host ends."""
        return self.lab.dial(self.lab.layout.outgoing(Protocol.TCP, REMOTE, port, APP)).seat


@contextmanager
def made(variant: str) -> Iterator[Scene]:
    with Lab(Layout(bridges=(BRIDGE,))) as lab:
        lab.serve_data_plane(PLAIN)
        lab.listen(BRIDGE.name, Protocol.TCP, CONTAINER.port)
        with lab.inside(HOST):
            run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
            one = Scene(lab, variant)
        yield one


@pytest.fixture
def scene(variant: str) -> Iterator[Scene]:
    with made(variant) as one:
        yield one


def test_the_commands_tell_of_it_and_repair_it(scene: Scene) -> None:
    scene.restore(DOCKER)
    with scene.lab.inside(HOST):
        tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "iptables", "--iptables-mode", scene.variant)
        scene.restore(GONE + DOCKER)
        scene.rule("-A", "OUTPUT", "-p", "tcp", "--dport", "4000", "-j", "REDIRECT", "--to-ports", "4444")
        status = tpctl("status", "--json", check=False)
        assert status.returncode == 3
        told = json.loads(status.stdout)
        assert any("TPCTL_ARRIVING stands before a rule that belongs before it" in line for line in told["drift"])
        assert "repaired" in tpctl("apply").stdout
        assert "nothing was changed" in tpctl("apply").stdout
        status = tpctl("status", "--json", check=False)
        told = json.loads(status.stdout)
        assert (status.returncode, told["drift"]) == (3, [])
        assert len([line for line in told["problems"] if "go past the data plane" in line]) == 1
        tpctl("uninstall")
    assert "TPCTL" not in scene.saved()


def test_what_docker_publishes_stays_dockers_when_it_is_started_again(scene: Scene) -> None:
    scene.restore(DOCKER)
    scene.install(PLAIN)
    assert scene.drift() == ""
    assert (scene.arriving(PUBLISHED), scene.arriving(OWN)) == (CONTAINER, INBOUND)
    scene.restore(GONE + DOCKER)
    assert scene.arriving(PUBLISHED) == INBOUND
    drift = scene.drift()
    assert "jump to TPCTL_ARRIVING stands before a rule that belongs before it" in drift
    assert "-j DOCKER`" in drift
    scene.repair()
    assert scene.drift() == ""
    assert (scene.arriving(PUBLISHED), scene.arriving(OWN)) == (CONTAINER, INBOUND)


def test_docker_that_publishes_nothing_yet_belongs_before_our_jump_too(scene: Scene) -> None:
    scene.install(PLAIN)
    scene.restore("".join(f"{line}\n" for line in DOCKER.splitlines() if "DNAT" not in line))
    assert "TPCTL_ARRIVING stands before" in scene.drift()
    scene.repair()
    scene.rule("-A", "DOCKER", "-p", "tcp", "--dport", str(PUBLISHED), "-j", "DNAT", "--to", "172.17.0.2:80")
    assert (scene.arriving(PUBLISHED), scene.drift()) == (CONTAINER, "")


def test_ours_come_first_where_the_policy_says_so(scene: Scene) -> None:
    scene.restore(DOCKER)
    scene.install(Policy(PROXY, inbound=Inbound(insert=True)))
    assert (scene.arriving(PUBLISHED), scene.drift()) == (INBOUND, "")
    scene.rule("-I", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER")
    assert scene.arriving(PUBLISHED) == CONTAINER
    assert "stands behind a rule that belongs after it" in scene.drift()
    scene.repair()
    assert (scene.arriving(PUBLISHED), scene.drift()) == (INBOUND, "")


@pytest.mark.parametrize("target", ["ACCEPT", "RETURN"])
def test_a_rule_that_ends_the_chain_comes_after_our_jump(scene: Scene, target: str) -> None:
    scene.install(PLAIN)
    for chain in ("PREROUTING", "OUTPUT"):
        scene.rule("-I", chain, "-p", "tcp", "-j", target)
    assert (scene.arriving(OWN), scene.leaving(443)) == (None, None)
    drift = scene.drift()
    assert "TPCTL_ARRIVING stands behind a rule that belongs after it" in drift
    assert f"`-A OUTPUT -p tcp -j {target}`, which ends the chain for tcp" in drift
    scene.repair()
    assert (scene.arriving(OWN), scene.leaving(443), scene.drift()) == (INBOUND, OUTBOUND, "")


def test_a_chain_that_ends_in_many_ways_comes_after_our_jump(scene: Scene) -> None:
    """Too many for a jump of ours before each."""
    scene.install(PLAIN)
    scene.rule("-N", "LIMITS")
    for port in range(OWN, OWN + 10):
        scene.rule("-A", "LIMITS", "-p", "tcp", "--dport", str(port), "-j", "ACCEPT")
    scene.rule("-I", "PREROUTING", "-j", "LIMITS")
    assert scene.arriving(OWN) is None
    assert "TPCTL_ARRIVING stands behind a rule that belongs after it" in scene.drift()
    scene.repair()
    assert (scene.arriving(OWN), scene.drift()) == (INBOUND, "")


def test_a_rule_that_ends_the_chain_before_dockers_takes_nothing_from_either(scene: Scene) -> None:
    scene.restore(DOCKER)
    scene.rule("-I", "PREROUTING", "-s", "198.19.255.0/24", "-p", "tcp", "--dport", str(OWN), "-j", "ACCEPT")
    scene.rule("-N", "LIMITS")
    scene.rule("-A", "LIMITS", "-p", "tcp", "--dport", "9001", "-j", "ACCEPT")
    scene.rule("-I", "PREROUTING", "-i", "eth0", "-j", "LIMITS")
    scene.install(PLAIN)
    assert [scene.arriving(port) for port in (PUBLISHED, OWN, 9001)] == [CONTAINER, INBOUND, INBOUND]
    assert scene.drift() == ""
    scene.rule("-I", "PREROUTING", "-p", "tcp", "--dport", "9002", "-j", "RETURN")
    assert "9002 -j RETURN`, which ends the chain for tcp port 9002" in scene.drift()
    scene.repair()
    assert [scene.arriving(port) for port in (PUBLISHED, OWN, 9002)] == [CONTAINER, INBOUND, INBOUND]
    scene.rule("-D", "PREROUTING", "-p", "tcp", "--dport", "9002", "-j", "RETURN")
    assert "9002" in scene.drift()
    scene.repair()
    assert scene.drift() == ""
    with scene.lab.inside(HOST):
        scene.engine.remove()
    assert "TPCTL" not in scene.saved()


def test_what_the_policy_leaves_alone_may_be_ended_anywhere(scene: Scene) -> None:
    outbound = Outbound(exclude_destinations=(ip_network("10.0.0.0/8"),))
    scene.install(Policy(PROXY, inbound=Inbound(exclude_ports=(PortRange(22),)), outbound=outbound))
    for words in (
        ("PREROUTING", "-p", "tcp", "--dport", "22"),
        ("PREROUTING", "-p", "udp"),
        ("PREROUTING", "-i", "lo"),
        ("PREROUTING", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED"),
        ("PREROUTING", "-m", "addrtype", "!", "--dst-type", "LOCAL"),
        ("OUTPUT", "-o", "lo", "-m", "owner", "--uid-owner", str(APP)),
        ("OUTPUT", "-d", "10.1.0.0/16"),
        ("OUTPUT", "-m", "owner", "--uid-owner", str(PROXY), "!", "-o", "lo"),
    ):
        scene.rule("-I", *words, "-j", "ACCEPT")
        assert scene.drift() == "", words


def test_a_redirect_of_others_comes_first_and_is_told(scene: Scene) -> None:
    scene.lab.listen(HOST, Protocol.TCP, 4444)
    for chain in ("PREROUTING", "OUTPUT"):
        scene.rule("-A", chain, "-p", "tcp", "--dport", "4000", "-j", "REDIRECT", "--to-ports", "4444")
    assert scene.install(PLAIN).count("go past the data plane") == 2
    assert (scene.arriving(4000), scene.leaving(4000)) == (Seat(HOST, 4444), Seat(HOST, 4444))
    found = scene.inspect()
    assert (found.drift, len(found.ahead)) == ((), 2)
    assert "--dport 4000 -j REDIRECT --to-ports 4444`, which translates tcp port 4000" in found.ahead[0]
    assert "go past the data plane" in found.ahead[0]
    excluded = (PortRange(4000),)
    said = scene.install(
        Policy(PROXY, inbound=Inbound(exclude_ports=excluded), outbound=Outbound(exclude_ports=excluded))
    )
    assert (said, scene.inspect().ahead) == ("", ())
    said = scene.install(Policy(PROXY, inbound=Inbound(insert=True), outbound=Outbound(insert=True)))
    assert (scene.arriving(4000), scene.leaving(4000)) == (INBOUND, OUTBOUND)
    assert (said, scene.inspect().ahead) == ("", ())


def test_services_of_kubernetes_come_first_and_are_told_where_they_pass(scene: Scene) -> None:
    scene.install(PLAIN)
    scene.restore(KUBERNETES)
    found = scene.inspect()
    assert found.drift == ()
    service = scene.lab.layout.outgoing(Protocol.TCP, ip_address("10.96.0.10"), 443, APP)
    assert scene.lab.dial(service).seat == CONTAINER
    (told,) = found.ahead
    assert "nat OUTPUT" in told
    assert "KUBE-SERVICES" in told
    scene.install(Policy(PROXY, outbound=Outbound(exclude_destinations=(ip_network("10.96.0.0/12"),))))
    assert scene.inspect().ahead == ()


def test_somebody_who_restores_what_he_saved_is_noticed(scene: Scene) -> None:
    saved = scene.saved()
    scene.install(PLAIN)
    with scene.lab.inside(HOST):
        run([f"iptables-{scene.variant}-restore"], stdin=saved + DOCKER)
    found = scene.inspect()
    assert found.drift or not found.installed
    scene.repair()
    assert scene.drift() == ""
    assert (scene.arriving(PUBLISHED), scene.arriving(OWN)) == (CONTAINER, INBOUND)


def test_an_accept_in_raw_does_not_keep_queries_from_their_zones(scene: Scene) -> None:
    scene.install(CAPTURING)
    scene.rule("-I", "OUTPUT", "-p", "udp", "-j", "ACCEPT", table="raw")
    assert "raw OUTPUT: tpctl's jump to TPCTL_ZONE_OUTPUT stands behind" in scene.drift()
    scene.repair()
    assert scene.drift() == ""


def test_an_accept_does_not_open_the_data_planes_own_ports(scene: Scene) -> None:
    scene.install(PLAIN)
    assert scene.arriving(INBOUND.port) is None
    answers = ("-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED")
    for words in (answers, ("-i", "lo"), ("-p", "tcp", "--dport", str(OWN))):
        scene.rule("-I", "INPUT", *words, "-j", "ACCEPT", table="filter")
    assert scene.drift() == ""
    scene.rule("-N", "ts-input", table="filter")
    scene.rule("-A", "ts-input", "-i", "eth0", "-j", "ACCEPT", table="filter")
    scene.rule("-I", "INPUT", "-j", "ts-input", table="filter")
    assert scene.arriving(INBOUND.port) == INBOUND
    assert "filter INPUT: tpctl's jump to TPCTL_GUARD stands behind a rule that belongs after it" in scene.drift()
    scene.repair()
    assert (scene.arriving(INBOUND.port), scene.drift()) == (None, "")


def test_somebodys_masquerade_leaves_answers_to_queries_alone(scene: Scene) -> None:
    scene.install(CAPTURING)
    scene.rule("-I", "POSTROUTING", "-s", "172.17.0.0/16", "!", "-o", "docker0", "-j", "MASQUERADE")
    scene.rule("-I", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    assert scene.drift() == ""
    scene.rule("-I", "POSTROUTING", "-j", "MASQUERADE")
    assert "nat POSTROUTING: tpctl's jump to TPCTL_DNS_SOURCE stands behind" in scene.drift()
    scene.repair()
    assert scene.drift() == ""

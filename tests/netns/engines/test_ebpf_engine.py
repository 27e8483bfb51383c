"""Connections through the eBPF engine on the running kernel: listeners, original destinations, DNS, namespaces."""

from __future__ import annotations

import select
import socket
import struct
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.netns.engines.ebpf_scene import (
    APP,
    FAMILIES,
    PATIENCE_SECONDS,
    PLAIN,
    PROXY,
    REMOTE,
    SERVER,
    SO_ORIGINAL_DST,
    Scene,
    connected,
    laboratory,
    listening,
)
from tpctl.rehearsal.cgroup import OwnPlace, enter, group
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS
from tpctl.spec.policy import (
    Family,
    Inbound,
    Outbound,
    PortRange,
    Protocol,
    WhenProxyDown,
)

pytestmark = pytest.mark.root


@pytest.mark.parametrize("family", FAMILIES)
def test_listeners_that_were_there_before_are_found(scene: Scene, family: Family) -> None:
    scene.lab.serve_data_plane(PLAIN)
    scene.apply(PLAIN)
    assert scene.arriving(family) == "host:15006"


@pytest.mark.parametrize("family", FAMILIES)
def test_listeners_that_come_later_register_themselves(scene: Scene, family: Family) -> None:
    scene.apply(PLAIN)
    scene.lab.serve_data_plane(PLAIN)
    assert scene.arriving(family) == "host:15006"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_data_plane_connections_are_refused(scene: Scene, family: Family) -> None:
    scene.apply(PLAIN)
    assert scene.arriving(family) == "refused"
    assert scene.outgoing(family) == "refused"
    assert scene.arriving(family, 22) == "host:22"


def test_with_bypass_connections_go_straight_while_the_data_plane_is_away(place: OwnPlace) -> None:
    with laboratory(place) as scene:
        scene.apply(replace(PLAIN, when_proxy_down=WhenProxyDown.BYPASS))
        for _ in range(2):
            for family in Family:
                assert scene.arriving(family) == "host:8080"
                assert scene.outgoing(family) == "peer:8080"
            query = scene.lab.layout.outgoing(Protocol.UDP, REMOTE[Family.IPV4], 53, APP)
            assert scene.who(query) == "peer:53"
            scene.lab.serve_data_plane(PLAIN)
            for family in Family:
                assert scene.arriving(family) == "host:15006"
                assert scene.outgoing(family) == "host:15001"
            assert scene.who(query) == "host:15053"
            scene.lab.forget(HOST)


def test_calls_to_this_host_itself_do_not_wait_for_the_data_plane(scene: Scene) -> None:
    scene.apply(PLAIN)
    for family in Family:
        own = scene.lab.layout.outgoing(Protocol.TCP, HOST_ADDRESS[family], 8080, APP)
        assert scene.who(own) == "host:8080"
    # From another address of this host than it is for.
    crossed = replace(
        scene.lab.layout.outgoing(Protocol.TCP, HOST_ADDRESS[Family.IPV4], 8080, APP), source=ip_address("127.0.0.9")
    )
    assert scene.who(crossed) == "host:8080"


@pytest.mark.parametrize("before", [True, False])
def test_workers_that_share_a_port_share_the_connections(scene: Scene, before: bool) -> None:
    if not before:
        scene.apply(PLAIN)
    with scene.lab.inside(HOST, PROXY):
        workers = [listening("0.0.0.0", 15006, shared=True) for _ in range(3)]
    if before:
        scene.apply(PLAIN)
    assert scene.figures()["inbound listeners"] == 3
    while workers:
        served: Counter[int] = Counter()
        clients = [connected(scene, "peer", str(HOST_ADDRESS[Family.IPV4])) for _ in range(40)]
        while sum(served.values()) < 40:
            ready, _, _ = select.select(workers, [], [], PATIENCE_SECONDS)
            assert ready, served
            for worker in ready:
                worker.accept()[0].close()
                served[workers.index(worker)] += 1
        assert len(served) == len(workers)
        for client in clients:
            client.close()
        workers.pop(0).close()


def test_only_a_listener_on_every_address_can_stand_for_the_data_plane(scene: Scene) -> None:
    """Anyone may listen on the data plane's port of an address of his own."""
    with scene.lab.inside(HOST, APP):
        before = listening("127.0.0.9", 15006)
    scene.apply(PLAIN)
    with scene.lab.inside(HOST, APP):
        after = listening("127.0.0.10", 15006)
    assert scene.arriving(Family.IPV4) == "refused"
    before.close()
    after.close()


@pytest.mark.parametrize(
    ("address", "v6_socket"), [("203.0.113.10", False), ("203.0.113.10", True), ("2001:db8:10::10", False)]
)
def test_both_ends_see_what_was_asked_for(scene: Scene, address: str, v6_socket: bool) -> None:
    """The data plane by SO_ORIGINAL_DST, also on a dual-stack socket; the application by getpeername."""
    scene.apply(PLAIN)
    with scene.lab.inside(HOST, PROXY):
        listener = listening("::", 15001)
    with listener, connected(scene, HOST, address, v6_socket=v6_socket) as client:
        accepted, _ = listener.accept()
        with accepted:
            if ":" in address:
                raw = accepted.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
                assert ip_address(raw[8:24]) == ip_address(address)
            else:
                raw = accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
                assert ip_address(raw[4:8]) == ip_address(address)
            assert struct.unpack_from("!H", raw, 2) == (8080,)
        shown = client.getpeername()
        assert (shown[0].removeprefix("::ffff:"), shown[1]) == (address, 8080)


def test_a_socket_that_is_used_again_forgets(scene: Scene) -> None:
    """Refused, then connected to this host itself: the address it asked for first is not shown again."""
    scene.apply(replace(PLAIN, guard_ports=False))
    with scene.lab.inside(HOST, APP), socket.socket() as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(("203.0.113.10", 8080))
        with listening("127.0.0.1", 15001) as application:
            client.connect(("127.0.0.1", 15001))
            accepted, _ = application.accept()
        assert client.getpeername() == ("127.0.0.1", 15001)
        with accepted, pytest.raises(OSError, match=r"No such file|not available"):
            accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)


@pytest.mark.parametrize("server", [SERVER, "::ffff:" + SERVER, "2001:db8::53"])
@pytest.mark.parametrize("connect", [True, False])
def test_dns_answers_come_from_the_server_that_was_asked(scene: Scene, server: str, connect: bool) -> None:
    scene.apply(PLAIN)
    with scene.lab.inside(HOST, PROXY):
        local = ("::1" if server.startswith("2001") else "127.0.0.1", 15053)
        proxy = socket.socket(socket.AF_INET6 if ":" in local[0] else socket.AF_INET, socket.SOCK_DGRAM)
        proxy.settimeout(PATIENCE_SECONDS)
        proxy.bind(local)
    with scene.lab.inside(HOST, APP):
        client = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
        client.settimeout(PATIENCE_SECONDS)
    with proxy, client:
        if connect:
            client.connect((server, 53))
            client.send(b"query")
            assert client.getpeername()[:2] == (server, 53)
        else:
            client.sendto(b"query", (server, 53))
        asked, asker = proxy.recvfrom(64)
        proxy.sendto(asked, asker)
        answer, sender = client.recvfrom(64)
        assert (answer, sender[:2]) == (b"query", (server, 53))


def test_two_namespaces_do_not_affect_each_other(place: OwnPlace) -> None:
    other = replace(PLAIN, outbound=Outbound(port=10001), inbound=Inbound(port=16006))
    with laboratory(place) as one, laboratory(place) as two, laboratory(place) as neither:
        for scene, policy in ((one, PLAIN), (two, other)):
            scene.apply(policy)
            scene.lab.serve_data_plane(policy)
        for family in Family:
            assert (one.outgoing(family), one.arriving(family)) == ("host:15001", "host:15006")
            assert (two.outgoing(family), two.arriving(family)) == ("host:10001", "host:16006")
            assert (neither.outgoing(family), neither.arriving(family)) == ("peer:8080", "host:8080")
        one.remove()
        assert (one.outgoing(Family.IPV4), one.arriving(Family.IPV4)) == ("peer:8080", "host:8080")
        assert (two.outgoing(Family.IPV4), two.arriving(Family.IPV4)) == ("host:10001", "host:16006")


def test_processes_outside_the_chosen_cgroup_are_left_alone(place: OwnPlace) -> None:
    chosen = place.cgroup / "service"
    chosen.mkdir()
    policy = replace(PLAIN, inbound=Inbound(include_ports=(PortRange(8080),)), cgroup=group(chosen))
    try:
        with laboratory(place) as scene:
            scene.apply(policy)
            scene.lab.serve_data_plane(policy)
            assert scene.outgoing(Family.IPV4) == "peer:8080"
            enter(chosen)
            assert scene.outgoing(Family.IPV4) == "host:15001"
            assert scene.outgoing(Family.IPV6) == "host:15001"
            enter(place.cgroup)
            assert scene.outgoing(Family.IPV6) == "peer:8080"
            assert scene.arriving(Family.IPV4) == "host:15006"
            assert scene.arriving(Family.IPV4, 8081) == "host:8081"
            scene.remove()
    finally:
        chosen.rmdir()

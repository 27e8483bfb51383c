"""The eBPF engine on real sockets: what equivalence with `decide()` does not show."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from agent import loopback
from agent.decide import Connection
from agent.engines.ebpf import companion, installed, syscall
from agent.engines.ebpf import place as ebpf_place
from agent.engines.ebpf.engine import EbpfEngine, load
from agent.engines.ebpf.plan import EbpfPlan
from agent.engines.ebpf.programs import PROGRAMS
from agent.errors import ApplyError, HostError, InputError
from agent.host import cgroups
from agent.policy import (
    Dns,
    DnsCapture,
    Family,
    Inbound,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    VirtualNetwork,
    WhenProxyDown,
)
from agent.rehearsal.cgroup import OwnPlace, enter, group, own_place
from agent.rehearsal.lab import Lab
from agent.rehearsal.layout import HOST, HOST_ADDRESS, stage
from tests.netns.lab import run

pytestmark = pytest.mark.root

PROXY, APP = 5678, 1000
PLAIN = Policy(PROXY, inbound=Inbound(exclude_ports=(PortRange(22),)), dns=Dns(DnsCapture.ALL))
REMOTE = {Family.IPV4: ip_address("203.0.113.10"), Family.IPV6: ip_address("2001:db8:10::10")}
SERVER = "198.51.100.53"
_ABORT = struct.pack("ii", 1, 0)
_SO_ORIGINAL_DST = 80
FAMILIES = list(Family)
PATIENCE_SECONDS = 60.0


@dataclass
class Scene:
    """A laboratory with the engine ready in its host."""

    place: OwnPlace
    lab: Lab
    engine: EbpfEngine

    def apply(self, policy: Policy) -> EbpfPlan:
        with self.lab.inside(HOST):
            plan = self.engine.plan(policy)
            self.engine.apply(plan)
            return plan

    def remove(self) -> tuple[str, ...]:
        with self.lab.inside(HOST):
            return self.engine.remove().removed

    def who(self, connection: Connection) -> str:
        self.lab.serve(connection)
        return str(self.lab.dial(connection))

    def outgoing(self, family: Family, port: int = 8080, uid: int = APP) -> str:
        return self.who(self.lab.layout.outgoing(Protocol.TCP, REMOTE[family], port, uid))

    def arriving(self, family: Family, port: int = 8080) -> str:
        return self.who(self.lab.layout.arriving(REMOTE[family], HOST_ADDRESS[family], Protocol.TCP, port))

    def figures(self) -> dict[str, int]:
        with self.lab.inside(HOST):
            return {figure.name: figure.value for figure in self.engine.inspect(None).figures}


@contextlib.contextmanager
def laboratory(place: OwnPlace) -> Iterator[Scene]:
    with Lab(stage(PLAIN).layout) as lab:
        with lab.inside(HOST):
            loopback.add("lo")
            engine = place.engine()
        yield Scene(place, lab, engine)


@pytest.fixture
def place() -> Iterator[OwnPlace]:
    with own_place() as made:
        yield made


@pytest.fixture
def scene(place: OwnPlace) -> Iterator[Scene]:
    with laboratory(place) as made:
        yield made


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


def listening(address: str, port: int, *, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind((address, port))
    made.listen(64)
    made.settimeout(PATIENCE_SECONDS)
    return made


def connected(scene: Scene, node: str, address: str, port: int = 8080, *, v6_socket: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in address or v6_socket else socket.AF_INET
    with scene.lab.inside(node, APP if node == HOST else 0):
        made = socket.socket(family, socket.SOCK_STREAM)
        made.settimeout(PATIENCE_SECONDS)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        made.connect((f"::ffff:{address}" if v6_socket else address, port))
        return made


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
                raw = accepted.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
                assert ip_address(raw[8:24]) == ip_address(address)
            else:
                raw = accepted.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
                assert ip_address(raw[4:8]) == ip_address(address)
            assert struct.unpack_from("!H", raw, 2) == (8080,)
        shown = client.getpeername()
        assert (shown[0].removeprefix("::ffff:"), shown[1]) == (address, 8080)


def test_a_socket_that_is_used_again_forgets(scene: Scene) -> None:
    """Refused, then connected to this host itself: the address it asked for first is not shown again."""
    scene.apply(PLAIN)
    with scene.lab.inside(HOST, APP), socket.socket() as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(("203.0.113.10", 8080))
        with listening("127.0.0.1", 15001) as application:
            client.connect(("127.0.0.1", 15001))
            accepted, _ = application.accept()
        assert client.getpeername() == ("127.0.0.1", 15001)
        with accepted, pytest.raises(OSError, match=r"No such file|not available"):
            accepted.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)


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


def test_the_cgroup_of_an_installation_can_be_changed(place: OwnPlace) -> None:
    chosen = place.cgroup / "service"
    chosen.mkdir()
    try:
        with laboratory(place) as scene:
            scene.lab.serve_data_plane(PLAIN)
            for cgroup, expected in ((None, "host:15001"), (group(chosen), "peer:8080"), (None, "host:15001")):
                plan = scene.apply(replace(PLAIN, cgroup=cgroup))
                assert [scene.outgoing(family) for family in Family] == [expected, expected]
                with scene.lab.inside(HOST):
                    assert scene.engine.inspect(plan).drift == ()
            scene.remove()
    finally:
        chosen.rmdir()


def test_a_service_that_was_started_anew_shows_as_drift(place: OwnPlace) -> None:
    chosen = place.cgroup / "service"
    chosen.mkdir()
    try:
        with laboratory(place) as scene:
            plan = scene.apply(replace(PLAIN, cgroup=group(chosen)))
            chosen.rmdir()
            with scene.lab.inside(HOST):
                assert any("gone" in line for line in scene.engine.inspect(plan).drift)
                chosen.mkdir()
                assert any("gone" in line for line in scene.engine.inspect(plan).drift)
                scene.apply(replace(PLAIN, cgroup=group(chosen)))
            scene.lab.serve_data_plane(PLAIN)
            enter(chosen)
            assert scene.outgoing(Family.IPV4) == "host:15001"
            enter(place.cgroup)
            scene.remove()
    finally:
        chosen.rmdir()


def test_status_tells_outcomes_by_direction_and_how_full_the_maps_are(scene: Scene) -> None:
    inbound = Inbound(exclude_ports=(PortRange(22),), exclude_sources=(ip_network("192.0.2.0/24"),))
    scene.apply(replace(PLAIN, inbound=inbound))
    assert scene.arriving(Family.IPV4) == "refused"
    scene.lab.serve_data_plane(PLAIN)
    for port, expected in ((22, "host:22"), (8080, "host:15006")):
        assert scene.arriving(Family.IPV4, port) == expected
    assert scene.outgoing(Family.IPV6) == "host:15001"
    found = scene.figures()
    assert (found["inbound redirected"], found["inbound passed"], found["outbound redirected"]) == (1, 1, 1)
    assert found["inbound refused"] >= 1
    assert found["excluded networks"] == 1
    assert "excluded users" not in found
    assert found["inbound listeners"] == 2


def test_an_install_into_another_bpffs_takes_the_old_ones_place(scene: Scene, tmp_path: Path) -> None:
    old = scene.engine
    scene.apply(PLAIN)
    scene.lab.serve_data_plane(PLAIN)
    ebpf_place.mount_bpffs(tmp_path)
    try:
        scene.engine = load(top=scene.place.cgroup, pins=tmp_path)
        scene.apply(PLAIN)
        assert scene.outgoing(Family.IPV4) == "host:15001"
        assert scene.arriving(Family.IPV6) == "host:15006"
        with scene.lab.inside(HOST):
            assert not old.inspect(None).installed
            assert any(str(tmp_path) in line for line in old.remove().removed)
        assert scene.outgoing(Family.IPV4) == "peer:8080"
        assert scene.arriving(Family.IPV6) == "host:8080"
    finally:
        run(["umount", str(tmp_path)])


def test_virtual_networks_come_and_go_with_their_table(scene: Scene) -> None:
    network = VirtualNetwork("br0", ip_network("172.30.0.0/16"))
    with scene.lab.inside(HOST):
        with_network = scene.apply(replace(PLAIN, virtual_networks=(network,), drop_invalid=True))
        assert "tpctl_ebpf" in run(["nft", "list", "tables"]).stdout
        assert scene.engine.inspect(with_network).drift == ()
        run(["nft", "flush", "chain", companion.TABLE.split()[0], companion.TABLE.split()[1], "prerouting_first"])
        assert any("i2" in line for line in scene.engine.inspect(with_network).drift)
        scene.apply(replace(PLAIN, virtual_networks=(network,)))
        plain = scene.apply(PLAIN)
        assert "tpctl_ebpf" not in run(["nft", "list", "tables"]).stdout
        assert scene.engine.inspect(plain).drift == ()
        scene.apply(replace(PLAIN, virtual_networks=(network,)))
        assert any("table inet tpctl_ebpf" in line for line in scene.engine.remove().removed)
        assert run(["nft", "list", "ruleset"]).stdout == ""


def test_programs_that_are_refused_leave_the_table_as_it_was(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with_network = replace(PLAIN, virtual_networks=(VirtualNetwork("br0", ip_network("172.30.0.0/16")),))
    plan = scene.apply(with_network)
    for policy in (replace(with_network, outbound=Outbound(port=15011)), PLAIN):
        with monkeypatch.context() as patch:
            patch.setattr(syscall, "replace", refuse)
            with pytest.raises(ApplyError, match="as it was before"):
                scene.apply(policy)
        with scene.lab.inside(HOST):
            assert scene.engine.inspect(plan).drift == ()


def refuse(*_: object) -> None:
    raise OSError(1, "Operation not permitted")


def test_replacing_changes_everything_or_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = scene.apply(PLAIN)
    scene.lab.serve_data_plane(PLAIN)
    replaced = 0
    real = syscall.replace

    def failing(link: int, program: int) -> None:
        nonlocal replaced
        replaced += 1
        if replaced == 9:
            raise OSError(12, "Cannot allocate memory")
        real(link, program)

    monkeypatch.setattr(syscall, "replace", failing)
    with pytest.raises(ApplyError, match=r"connect6.*as it was before|connect6"):
        scene.apply(replace(PLAIN, outbound=Outbound(port=10001)))
    monkeypatch.undo()
    with scene.lab.inside(HOST):
        assert scene.engine.inspect(plan).drift == ()
    for family in Family:
        assert (scene.outgoing(family), scene.arriving(family)) == ("host:15001", "host:15006")


def test_a_first_install_that_fails_leaves_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    attached = 0
    real = syscall.attach

    def failing(program: int, target: int, kind: int) -> int:
        nonlocal attached
        attached += 1
        if attached == len(PROGRAMS):
            raise OSError(22, "Invalid argument")
        return real(program, target, kind)

    monkeypatch.setattr(syscall, "attach", failing)
    with pytest.raises(ApplyError, match="sendmsg6"):
        scene.apply(PLAIN)
    monkeypatch.undo()
    with scene.lab.inside(HOST):
        assert not scene.engine.inspect(None).installed
        assert not scene.engine.where.folder.exists()
    assert scene.outgoing(Family.IPV4) == "peer:8080"


def test_programs_that_the_kernel_does_not_run_are_taken_away(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_announce_namespace", lambda: None)
    with pytest.raises(ApplyError, match="does not run them"):
        scene.apply(PLAIN)
    with scene.lab.inside(HOST):
        assert not scene.engine.inspect(None).installed
    assert scene.outgoing(Family.IPV4) == "peer:8080"


def test_a_missing_program_and_a_changed_map_are_drift(scene: Scene) -> None:
    plan = scene.apply(PLAIN)
    with scene.lab.inside(HOST):
        (scene.engine.where.folder / "connect6").unlink()
        assert scene.engine.inspect(plan).drift == ("-program connect6 on the applications' cgroup",)
        other = scene.engine.plan(replace(PLAIN, inbound=Inbound(exclude_ports=(PortRange(23),))))
        assert any("list 0: 23" in line for line in scene.engine.inspect(other).drift)
    scene.apply(PLAIN)
    with scene.lab.inside(HOST):
        assert scene.engine.inspect(plan).drift == ()


def test_uninstalling_needs_no_state_and_can_be_repeated(scene: Scene) -> None:
    scene.apply(PLAIN)
    with scene.lab.inside(HOST):
        fresh = scene.place.engine()
        announced = fresh.remove(dry_run=True).removed
        assert len(announced) == len(PROGRAMS)
        assert fresh.inspect(None).installed
        assert fresh.remove().removed == announced
        assert fresh.remove().removed == ()
        assert not fresh.inspect(None).installed
    assert not (scene.place.pins / "tpctl").exists()
    for family in Family:
        assert (scene.outgoing(family), scene.arriving(family)) == ("peer:8080", "host:8080")


def test_what_a_dead_namespace_left_is_cleared(place: OwnPlace) -> None:
    with laboratory(place) as gone:
        gone.apply(PLAIN)
        with gone.lab.inside(HOST):
            folder = gone.engine.where.folder
    assert folder.exists()
    with laboratory(place) as scene:
        end = time.monotonic() + PATIENCE_SECONDS
        while not scene.engine.remove(dry_run=True).removed and time.monotonic() < end:
            time.sleep(0.05)  # the kernel takes namespaces apart in its own time
        scene.apply(PLAIN)
    assert not folder.exists()


def test_pins_are_for_root_only(scene: Scene) -> None:
    scene.apply(PLAIN)
    with scene.lab.inside(HOST):
        folder = scene.engine.where.folder
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.parent.stat().st_mode & 0o777 == 0o700


def test_what_ebpf_cannot_do_is_refused_with_the_way_out(scene: Scene) -> None:
    with pytest.raises(InputError, match=r"--iptables-logs.*--engine nftables"):
        scene.engine.plan(replace(PLAIN, log_level=7))
    network = VirtualNetwork("br0", ip_network("172.30.0.0/16"))
    bypass = replace(PLAIN, when_proxy_down=WhenProxyDown.BYPASS, drop_invalid=True)
    assert scene.engine.plan(bypass).companion
    with pytest.raises(InputError, match="--when-proxy-down bypass: virtual networks are left to nftables"):
        scene.engine.plan(replace(bypass, virtual_networks=(network,)))


def test_an_old_kernel_is_named(place: OwnPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        release = "4.19.0-27-amd64"
        machine = "x86_64"

    monkeypatch.setattr(os, "uname", Old)
    with pytest.raises(HostError, match=r"4\.19\.0.*needs 5\.8.*--engine nftables"):
        place.engine()


def test_a_host_without_cgroup2_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "mounts", lambda _process, _kind: [])
    with pytest.raises(HostError, match="cgroup2"):
        ebpf_place.find(pins=Path("/nowhere"))

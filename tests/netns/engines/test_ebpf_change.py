"""Installing, replacing and removing the eBPF engine on the running kernel: all or nothing, and nothing is left."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from tests.netns.engines.ebpf_scene import PATIENCE_SECONDS, PLAIN, Scene, laboratory
from tests.netns.lab import run
from tpctl.bpf import bpffs, syscall
from tpctl.bpf.programs import PROGRAMS
from tpctl.engines.ebpf import companion, installed
from tpctl.engines.ebpf import place as ebpf_place
from tpctl.engines.ebpf.engine import load
from tpctl.engines.nftables import nft
from tpctl.host import cgroups
from tpctl.rehearsal.cgroup import OwnPlace, enter, group
from tpctl.rehearsal.layout import HOST
from tpctl.spec.policy import (
    Family,
    Inbound,
    Outbound,
    PortRange,
    VirtualNetwork,
    WhenProxyDown,
)
from tpctl.system.errors import ApplyError, HalfDoneError, HostError, InputError

pytestmark = pytest.mark.root


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
    bpffs.mount(tmp_path)
    try:
        scene.engine = load(top=scene.place.cgroup, pins=tmp_path)
        scene.apply(PLAIN)
        assert scene.outgoing(Family.IPV4) == "host:15001"
        assert scene.arriving(Family.IPV6) == "host:15006"
        with scene.lab.inside(HOST):
            assert not old.inspect(None).installed
            assert any(str(tmp_path) in line for line in old.remove().removed)
            assert not (tmp_path / "tpctl").exists()
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
            with pytest.raises(ApplyError, match="as they were before"):
                scene.apply(policy)
        with scene.lab.inside(HOST):
            assert scene.engine.inspect(plan).drift == ()


def test_a_table_that_cannot_be_put_back_is_told(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with_network = replace(PLAIN, virtual_networks=(VirtualNetwork("br0", ip_network("172.30.0.0/16")),))
    scene.apply(with_network)

    with monkeypatch.context() as patch:

        def refuse_from_now_on(*_: object) -> None:
            patch.setattr(nft, "held", refuse)
            refuse()

        patch.setattr(syscall, "replace", refuse_from_now_on)
        with pytest.raises(HalfDoneError, match=r"nf_tables back failed too: Operation not permitted.*tpctl status"):
            scene.apply(replace(with_network, outbound=Outbound(port=15011)))


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
    with pytest.raises(ApplyError, match=r"connect6.*as they were before"):
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

"""Records: every format that was ever released is still read. tests/fixtures/records holds one of each.

The fixtures are never written anew; a new format gets a new file.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from tpctl.change import confirm
from tpctl.change.before import Before
from tpctl.record import state
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import (
    Cgroup,
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
from tpctl.system import runner
from tpctl.system.errors import ApplyError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "records"
RECORD = state.State(
    policy=Policy(
        proxy_uid=5678,
        families=frozenset(Family),
        loopback="lo",
        inbound=Inbound(
            port=15006,
            exclude_ports=(PortRange(22), PortRange(8000, 8100)),
            exclude_sources=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
            insert=True,
        ),
        outbound=Outbound(
            port=15001,
            include_ports=(PortRange(80),),
            exclude_destinations=(ip_network("169.254.0.0/16"),),
            exclude_uids=(UidExclusion(Protocol.UDP, (PortRange(53),), UidRange(101)),),
        ),
        dns=Dns(
            DnsCapture.LISTED,
            15053,
            (NameServer(ip_address("10.0.0.53")), NameServer(ip_address("fe80::1"), "eth0")),
            tcp=True,
            split_zones=False,
        ),
        virtual_networks=(VirtualNetwork("docker0", ip_network("172.17.0.0/16")),),
        drop_invalid=True,
        log_level=7,
        cgroup=Cgroup("system.slice/app.service", 4711),
    ),
    phase=state.INSTALLED,
    installed_at="2026-11-21T00:00:00+00:00",
    version="0.1.0",
    options=EngineOptions(
        engine="iptables",
        iptables_because="flag --iptables-mode asks for iptables",
        iptables_mode="nft",
        executables={"iptables": "/usr/sbin/iptables"},
        comments=False,
        wait_seconds=6,
        wait_interval_microseconds=7,
        max_retries=8,
        sleep_between_retries_seconds=0.5,
        verbose=True,
        ebpf_cgroup="/sys/fs/cgroup/unified",
        ebpf_bpffs="/run/bpf",
        store_firewalld=True,
        reload_firewalld=True,
    ),
    footprints={"iptables": {"hooks": ["ip nat PREROUTING"]}},
)
PENDING = confirm.Pending("uninstall", 60.0, 1234.5, "0123abcd", confirm.TIMER, Before(RECORD))
PENDING_OVER_KUMACTL = confirm.Pending(
    "install", 60.0, 1234.5, "0123abcd", confirm.PROCESS,
    Before(None, {"nft": {"4": {"nat": {"chains": [["KUMA_MESH_INBOUND", ["-j RETURN"]]], "jumps": []}}}}),
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this namespace's records are."""
    monkeypatch.setattr(state, "DIRECTORY", tmp_path)
    state.path().parent.mkdir()
    return state.path().parent


def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / name).read_text())
    return found


def test_format_1_is_read(place: Path) -> None:
    state.path().write_text((FIXTURES / "state-1.json").read_text())
    assert state.load() == RECORD


def test_the_pending_record_of_format_1_is_read(place: Path) -> None:
    confirm.path().write_text((FIXTURES / "pending-1.json").read_text())
    assert confirm.load() == PENDING


def test_the_current_format_has_a_fixture(place: Path) -> None:
    """A change of what is written needs a new format, unless older readers understand it."""
    assert state.document_of(RECORD) == document(f"state-{state.FORMAT}.json")
    assert (FIXTURES / f"pending-{confirm.FORMAT}.json").exists()


def test_the_configuration_is_read_as_written(place: Path) -> None:
    given = {"kumaDPUser": {"value": "kuma-dp", "origin": "flag --kuma-dp-user"}}
    state.save(dataclasses.replace(RECORD, inputs=given))
    assert state.load() == dataclasses.replace(RECORD, inputs=given)
    for damaged in ("text", 5, [1]):
        state.path().write_text(json.dumps({**document("state-1.json"), "inputs": damaged}))
        assert state.load() is None


@pytest.mark.parametrize("pending", [PENDING, PENDING_OVER_KUMACTL])
def test_a_pending_record_is_read_as_written(place: Path, pending: confirm.Pending) -> None:
    confirm._write(pending)
    assert confirm.load() == pending


def test_what_a_newer_version_added_is_passed_over(place: Path) -> None:
    newer = document("state-1.json")
    newer["options"]["invented"] = 1
    newer["invented"] = {}
    newer["policy"]["invented"] = True
    state.path().write_text(json.dumps(newer))
    assert state.load() == RECORD


def test_what_an_older_version_did_not_write_has_its_default(place: Path) -> None:
    older = document("state-1.json")
    del older["options"]["store_firewalld"]
    state.path().write_text(json.dumps(older))
    found = state.load()
    assert found
    assert found.options.store_firewalld is False


@pytest.mark.parametrize("damage", [{"format": 99}, {"format": "1"}, {"policy": None}, {"options": 5}])
def test_a_record_that_makes_no_sense_counts_as_none(place: Path, damage: dict[str, object]) -> None:
    broken = {**document("state-1.json"), **damage}
    state.path().write_text(json.dumps(broken))
    assert state.load() is None
    pending = document("pending-1.json")
    confirm.path().write_text(json.dumps({**pending, "before": {**pending["before"], "record": broken}}))
    assert confirm.load() is None


def test_what_a_killed_tpctl_has_left_goes_with_the_next_lock(place: Path) -> None:
    state.save(RECORD)
    (place / ".state-abcdefgh").write_text("{")
    (place / ".state-folder").mkdir()
    (place / ".state-folder" / "file").write_text("")
    with state.locked():
        assert [one.name for one in place.iterdir()] == ["state.json"]
    assert state.load() == RECORD


def test_a_renewal_is_finished_or_undone(place: Path) -> None:
    newer = dataclasses.replace(RECORD, version="9.9.9")
    state.save(RECORD)
    renewal = state.begin(newer)
    assert (state.load() or RECORD).phase == state.INSTALLING
    renewal.undo()
    assert state.load() == RECORD
    state.begin(newer).finish()
    assert state.load() == newer
    assert [one.name for one in place.iterdir()] == ["state.json"]


def test_the_lock_outlives_its_holder_in_what_it_has_started(place: Path) -> None:
    with state.locked():
        (descriptor,) = runner.INHERITED
        inherited = runner.run(["readlink", f"/proc/self/fd/{descriptor}"])
    assert inherited.stdout.strip().endswith(".lock")
    assert not runner.INHERITED


def test_a_record_that_cannot_be_written_leaves_no_temporary_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state.save(RECORD)
    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(ApplyError, match="No space left on device"):
        state.save(RECORD)
    assert [one.name for one in state.path().parent.iterdir()] == ["state.json"]
    assert state.load() == RECORD

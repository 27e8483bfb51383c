"""--cgroup on real sockets, by every engine: inside, below and outside, and a service that is started anew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.engines.ebpf_command import OWN_ROOT
from tests.netns.lab import APP, PROXY, PROXY_USER, bare_namespace, run, snapshot, tpctl
from tests.netns.test_lifecycle import ENGINES
from tpctl.engines.nftables.engine import NftablesEngine
from tpctl.engines.nftables.nft import NftError
from tpctl.engines.nftables.nft import find as find_nft
from tpctl.host import cgroups
from tpctl.rehearsal.cgroup import BELOW, OwnGroups, group, own_groups
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER_ADDRESS, Layout
from tpctl.rehearsal.rehearse import rehearse
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Dns, DnsCapture, Family, Inbound, Outbound, Policy, PortRange, Protocol
from tpctl.system.errors import HostError

pytestmark = pytest.mark.root

RULES = list(ENGINES)
SERVED = 8080


class Service:
    """A control group of the test's own that stands for a service's, and connections from around it."""

    def __init__(self, groups: OwnGroups, lab: Lab) -> None:
        self.groups = groups
        self.lab = lab
        self.directory = groups.home / "my app.service"
        self.start()

    @property
    def path(self) -> str:
        """From the root of the hierarchy."""
        return str(self.directory.relative_to(cgroups.root()))

    def start(self) -> None:
        """Make the group, with one below it."""
        (self.directory / BELOW).mkdir(parents=True)

    def stop(self) -> None:
        """What systemd does when a service's last process has ended."""
        for directory in (self.directory / BELOW, self.directory):
            if directory.exists():
                directory.rmdir()

    def restart(self) -> None:
        """Another group under the same path."""
        self.stop()
        self.start()

    def answers(self, protocol: Protocol = Protocol.TCP, port: int = SERVED) -> list[tuple[str, str, str]]:
        """Who answers a process outside, inside and below, by family."""
        found = []
        for family in Family:
            asked = self.lab.layout.outgoing(protocol, PEER_ADDRESS[family], port, APP)
            self.lab.serve(asked)
            who = []
            for directory in (self.groups.home, self.directory, self.directory / BELOW):
                with self.groups.inside(str(directory.relative_to(cgroups.root()))):
                    who.append(str(self.lab.dial(asked)))
            found.append((who[0], who[1], who[2]))
        return found

    def arriving(self, port: int) -> str:
        """Who answers another host."""
        asked = self.lab.layout.arriving(PEER_ADDRESS[Family.IPV4], HOST_ADDRESS[Family.IPV4], "tcp", port)
        self.lab.serve(asked)
        return str(self.lab.dial(asked))


@pytest.fixture
def service() -> Iterator[Service]:
    with own_groups() as groups, Lab(Layout(), groups) as lab:
        lab.serve_data_plane(Policy(PROXY))
        made = Service(groups, lab)
        try:
            yield made
        finally:
            made.stop()


def install(service: Service, engine: str, *more: str) -> subprocess.CompletedProcess[str]:
    flags = ("--kuma-dp-user", PROXY_USER, "--cgroup", service.path, "--include-inbound-ports", str(SERVED))
    with service.lab.inside(HOST):
        return tpctl("install", *flags, *ENGINES[engine], *more)


def status(service: Service) -> dict[str, Any]:
    with service.lab.inside(HOST):
        document: dict[str, Any] = json.loads(tpctl("status", "--json", check=False).stdout)
    return document


REDIRECTED = ("peer:8080", "host:15001", "host:15001")
LEFT_ALONE = ("peer:8080", "peer:8080", "peer:8080")


@pytest.mark.parametrize("engine", RULES)
def test_install_status_and_uninstall(service: Service, engine: str) -> None:
    with service.lab.inside(HOST):
        tpctl("install", "--kuma-dp-user", PROXY_USER, *ENGINES[engine])
        tpctl("uninstall")  # iptables-nft leaves base chains behind only once
        before = snapshot(counters=False)
    done = install(service, engine)
    assert (engine == "legacy") == ("prefer --engine nftables" in done.stdout + done.stderr)
    assert service.answers() == [REDIRECTED, REDIRECTED]
    assert (service.arriving(SERVED), service.arriving(SERVED + 1)) == ("host:15006", "host:8081")
    found = status(service)
    assert (found["drift"], found["policy"]["cgroup"]["path"]) == ([], service.path)
    assert "unchanged" in install(service, engine).stdout
    with service.lab.inside(HOST):
        tpctl("uninstall")
        assert snapshot(counters=False) == before
    assert service.answers() == [LEFT_ALONE, LEFT_ALONE]


@pytest.mark.parametrize("engine", RULES)
@pytest.mark.parametrize("insert", [False, True])
def test_dns_of_one_service(service: Service, engine: str, insert: bool) -> None:
    place = ("--redirect-outbound-insert-instead-of-append",) if insert else ()
    install(service, engine, "--redirect-all-dns-traffic", "--resolv-conf", "/dev/null", "--redirect-dns-tcp", *place)
    asked = ("peer:53", "host:15053", "host:15053")
    for protocol in Protocol:
        assert service.answers(protocol, 53) == [asked, asked]
    assert service.answers() == [REDIRECTED, REDIRECTED]


@pytest.mark.parametrize("engine", RULES)
@pytest.mark.parametrize("command", ["apply", "install"])
def test_a_service_that_was_started_anew(service: Service, engine: str, command: str) -> None:
    install(service, engine)
    service.restart()
    assert service.answers() == [LEFT_ALONE, LEFT_ALONE]
    (line,) = status(service)["drift"]
    assert "a group that is gone" in line
    with service.lab.inside(HOST):
        assert tpctl("status", check=False).returncode == 3
        if command == "apply":
            assert "nothing was changed" not in tpctl("apply").stdout
    if command == "install":
        assert "unchanged" not in install(service, engine).stdout
    assert service.answers() == [REDIRECTED, REDIRECTED]
    assert status(service)["drift"] == []
    with service.lab.inside(HOST):
        assert "nothing was changed" in tpctl("apply").stdout


@pytest.mark.parametrize("engine", RULES)
def test_a_service_that_does_not_run(service: Service, engine: str) -> None:
    install(service, engine)
    service.stop()
    assert "a group that is gone" in status(service)["drift"][0]
    with service.lab.inside(HOST):
        failed = tpctl("apply", check=False)
        assert failed.returncode == 2
        assert f"there is no control group {service.path}" in failed.stderr
        failed = tpctl("install", "--kuma-dp-user", PROXY_USER, "--cgroup", service.path, check=False)
        assert failed.returncode == 2
        # Even so, what is installed can be replaced, and taken away.
        tpctl("install", "--kuma-dp-user", PROXY_USER, *ENGINES[engine])
        tpctl("uninstall")
        assert not any(mark in text for text in snapshot(counters=False).values() for mark in ("TPCTL", "tpctl"))


@pytest.mark.needs("legacy")
def test_the_engine_is_changed(service: Service) -> None:
    for engine in (*RULES, RULES[0]):
        install(service, engine)
        assert service.answers() == [REDIRECTED, REDIRECTED]
        assert status(service)["drift"] == []


def test_firewalld_is_never_given_a_path_that_may_be_gone(service: Service) -> None:
    with service.lab.inside(HOST):
        failed = tpctl(
            "install", "--kuma-dp-user", PROXY_USER, "--cgroup", service.path, "--store-firewalld", check=False
        )
        assert failed.returncode == 2
        assert "--store-firewalld" in failed.stderr
        assert status(service)["installed"] is False


@pytest.mark.parametrize("engine", ["nftables", "nft"])
def test_where_the_hierarchy_is_mounted_elsewhere(service: Service, engine: str, tmp_path: Path) -> None:
    """And /sys/fs/cgroup is empty, as under `ip netns exec`, which mounts a /sys of its own."""
    script = f"""
        mount --make-rprivate /
        umount -l /sys
        mount -t sysfs none /sys
        mount -t cgroup2 none {tmp_path}
        exec "$@"
    """
    command = [sys.executable, "-m", "tpctl.cli.main"]
    flags = ["install", "--kuma-dp-user", PROXY_USER, "--cgroup", service.path, *ENGINES[engine]]
    with service.lab.inside(HOST):
        tpctl("uninstall")
        run(["unshare", "--mount", "sh", "-c", script, "sh", *command, *flags])
        shown = run(["unshare", "--mount", "sh", "-c", script, "sh", *command, "status", "--json"], check=False)
    assert json.loads(shown.stdout)["drift"] == []
    assert service.answers() == [REDIRECTED, REDIRECTED]
    assert status(service)["drift"] == []


@pytest.mark.parametrize("engine", ["nftables", "nft", "legacy"])
def test_in_a_control_group_namespace(service: Service, engine: str, tmp_path: Path) -> None:
    """In a container paths begin at its own root; so do nftables' levels, since Linux 6.11."""
    (tmp_path / "pins").mkdir()
    inside = ["unshare", "--cgroup", "--mount", "sh", "-c", OWN_ROOT, "sh", str(tmp_path)]
    flags = ["install", "--kuma-dp-user", PROXY_USER, "--cgroup", service.directory.name, *ENGINES[engine]]
    with service.lab.inside(HOST):
        tpctl("uninstall")
        run([*inside, sys.executable, "-m", "tpctl.cli.main", *flags])
    assert service.answers() == [REDIRECTED, REDIRECTED]


ONE_SERVICE = Policy(
    PROXY, inbound=Inbound(include_ports=(PortRange(SERVED),), insert=True), outbound=Outbound(insert=True)
)


@pytest.mark.parametrize("engine", ["nftables", "ebpf"])
def test_verify(service: Service, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    groups = sorted(service.groups.home.rglob("*"))
    flags = ("--kuma-dp-user", PROXY_USER, "--cgroup", service.path, "--engine", engine)
    with bare_namespace() as space, space.inside():
        report = json.loads(tpctl("verify", *flags, "--json").stdout)
    assert (report["ok"], report["engine"]) == (True, engine)
    where = {probe["label"]: probe["rule"] for probe in report["probes"] if probe["label"].endswith("the cgroup")}
    assert where["IPv6 outbound by an application, outside the cgroup"] == "c1"
    assert where["IPv4 outbound by an application, below the cgroup"] == "o7"
    assert sorted(service.groups.home.rglob("*")) == groups
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["nft", "legacy"])
def test_a_rehearsal_in_the_places_of_others(service: Service, engine: str) -> None:
    policy = Policy(
        PROXY,
        inbound=ONE_SERVICE.inbound,
        outbound=ONE_SERVICE.outbound,
        dns=Dns(DnsCapture.ALL, tcp=True),
        cgroup=group(service.directory),
    )
    before = cgroups.of_process("self")
    rehearsal = rehearse(policy, EngineOptions("iptables", iptables_mode=engine))
    assert rehearsal.ok
    assert cgroups.of_process("self") == before


def test_an_nft_that_does_not_know_control_groups(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    way = find_nft()

    def refuse(text: str) -> None:
        if "cgroupv2" in text:
            raise NftError("Error: syntax error, unexpected cgroupv2")

    monkeypatch.setattr(way, "check", refuse)
    engine = NftablesEngine(way, EngineOptions())
    with service.lab.inside(HOST):
        with pytest.raises(HostError, match=r"unexpected cgroupv2.* 0\.9\.9 .*--engine iptables"):
            engine.apply(engine.plan(Policy(PROXY, cgroup=group(service.directory))))
        assert not engine.inspect(None).installed
        engine.apply(engine.plan(Policy(PROXY)))  # only --cgroup needs it


def test_a_rehearsal_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mount is gone at once; its control groups when the next one comes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = (
        "import os, signal\n"
        "from tpctl.rehearsal.cgroup import own_place\n"
        "with own_place() as place:\n"
        "    print(place.cgroup, flush=True)\n"
        "    assert str(place.pins) in open('/proc/thread-self/mounts').read()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with own_groups():
        done = run([sys.executable, "-c", script], check=False)
        left = Path(done.stdout.strip())
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert str(tmp_path) not in Path("/proc/1/mounts").read_text() + Path("/proc/self/mounts").read_text()
        assert left.is_dir()
        deadline = time.monotonic() + 30
        while "populated 1" in (left / "cgroup.events").read_text():
            assert time.monotonic() < deadline, "the kernel takes leave of a killed process in its own time"
            time.sleep(0.01)
        with own_groups():
            assert not left.exists()


def test_a_group_whose_number_another_namespace_of_processes_has_taken_is_passed_over() -> None:
    with own_groups() as first:
        prefix, _, number = first.home.name.rpartition("-")
        taken = first.home / f"{prefix}-{int(number) + 1}"
        taken.mkdir()
        with own_groups() as second:
            assert second.home == first.home / f"{prefix}-{int(number) + 2}"
        taken.rmdir()

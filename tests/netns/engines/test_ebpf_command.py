"""`--engine ebpf` by the real command line, on a host whose whole cgroup hierarchy is one cgroup of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.engines.ebpf_command import Host, own_host
from tests.netns.kumactl_host import REMOTE
from tests.netns.lab import APP, PROXY, PROXY_USER, run
from tests.netns.test_recovery import BLOCKS
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, Layout
from tpctl.spec.policy import Policy

pytestmark = pytest.mark.root


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(Layout()) as made:
        yield made


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with own_host(tmp_path_factory.mktemp("host")) as made:
        yield made


def test_install_status_swap_and_uninstall(lab: Lab, host: Host) -> None:
    inbound = lab.layout.arriving(REMOTE, next(iter(HOST_ADDRESS.values())), "tcp", 8080)
    outbound = lab.layout.outgoing("tcp", REMOTE, 8080, APP)
    lab.serve(inbound)
    lab.serve(outbound)
    lab.serve_data_plane(Policy(PROXY))
    flags = ["--kuma-dp-user", PROXY_USER, "--exclude-inbound-ports", "22"]
    with lab.inside(HOST):
        done = host.tpctl("install", *flags, "--engine", "ebpf")
        assert done.returncode == 0, done.stderr
        assert "by ebpf" in done.stdout
    assert (str(lab.dial(inbound)), str(lab.dial(outbound))) == (f"{HOST}:15006", f"{HOST}:15001")
    with lab.inside(HOST):
        assert "tpctl" not in run(["nft", "list", "ruleset"]).stdout
        found = host.status()
        assert (found["engine"], found["drift"], found["problems"]) == ("ebpf", [], [])
        assert "unchanged" in host.tpctl("install", *flags, "--engine", "ebpf").stdout
        assert "ebpf" in host.tpctl("install", *flags, "--engine", "nftables").stdout
        assert host.status()["engine"] == "nftables"
    assert (str(lab.dial(inbound)), str(lab.dial(outbound))) == (f"{HOST}:15006", f"{HOST}:15001")
    with lab.inside(HOST):
        host.tpctl("install", *flags, "--engine", "ebpf")
        assert host.status()["engine"] == "ebpf"
        assert host.tpctl("uninstall").returncode == 0
        assert host.status()["installed"] is False
    assert (str(lab.dial(inbound)), str(lab.dial(outbound))) == (f"{HOST}:8080", f"{PEER}:8080")


def test_bypass_lets_connections_pass_while_nothing_listens(lab: Lab, host: Host) -> None:
    outbound = lab.layout.outgoing("tcp", REMOTE, 8080, APP)
    lab.serve(outbound)
    flags = ["--kuma-dp-user", PROXY_USER, "--engine", "ebpf"]
    with lab.inside(HOST):
        assert host.tpctl("install", *flags).returncode == 0
    assert str(lab.dial(outbound)) == "refused"
    with lab.inside(HOST):
        assert host.tpctl("install", *flags, "--when-proxy-down", "bypass").returncode == 0
    assert str(lab.dial(outbound)) == f"{PEER}:8080"
    lab.serve_data_plane(Policy(PROXY))
    assert str(lab.dial(outbound)) == f"{HOST}:15001"
    with lab.inside(HOST):
        host.tpctl("uninstall")


def test_kumactls_flags_of_its_ebpf_engine(lab: Lab, host: Host, tmp_path: Path) -> None:
    outbound = lab.layout.outgoing("tcp", REMOTE, 8080, APP)
    lab.serve(outbound)
    lab.serve_data_plane(Policy(PROXY))
    places = ["--ebpf-cgroup-path", f"{host.folder}/cgroup", "--ebpf-bpffs-path", "/sys/fs/bpf"]
    ignored = ["--ebpf-instance-ip", "192.0.2.1", "--ebpf-programs-source-path", str(tmp_path)]
    with lab.inside(HOST):
        done = host.tpctl(
            "install", "transparent-proxy", "--kuma-dp-user", PROXY_USER, "--experimental-transparent-proxy-engine",
            "--ebpf-enabled", *places, *ignored, "--ebpf-tc-attach-iface", "eth0", "--vnet", "br0:172.30.0.0/16",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("has no effect") == 3
        assert "virtual networks" in done.stderr
        found = host.status()
        assert (found["engine"], found["drift"], found["problems"]) == ("ebpf", [], [])
        assert {"name": "inbound listeners", "value": 2, "most": 64} in found["figures"]
    assert str(lab.dial(outbound)) == f"{HOST}:15001"
    with lab.inside(HOST):
        assert host.tpctl("uninstall").returncode == 0
        assert "tpctl" not in run(["nft", "list", "ruleset"]).stdout
    assert str(lab.dial(outbound)) == f"{PEER}:8080"


def test_by_hand_when_tpctl_itself_is_gone(lab: Lab, host: Host) -> None:
    inbound = lab.layout.arriving(REMOTE, next(iter(HOST_ADDRESS.values())), "tcp", 8080)
    lab.serve(inbound)
    lab.serve_data_plane(Policy(PROXY))
    with lab.inside(HOST):
        host.tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "ebpf", "--drop-invalid-packets")
    assert str(lab.dial(inbound)) == f"{HOST}:15006"
    with lab.inside(HOST):
        assert host.run("sh", "-ec", BLOCKS["ebpf"]).returncode == 0
        assert "tpctl" not in run(["nft", "list", "ruleset"]).stdout
        assert host.status()["installed"] is False
        assert host.tpctl("uninstall").returncode == 0
    assert str(lab.dial(inbound)) == f"{HOST}:8080"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--engine", "nftables", "--when-proxy-down", "bypass"), "--engine ebpf"),
        (("--when-proxy-down", "bypass"), "--engine ebpf"),
        (("--engine", "ebpf", "--ebpf-cgroup-path", "/nowhere"), "/nowhere is not a directory of control groups"),
        (("--ebpf-enabled", "--when-proxy-down", "bypass", "--vnet", "docker0:172.17.0.0/16"), "virtual networks"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(lab: Lab, host: Host, flags: tuple[str, ...], problem: str) -> None:
    with lab.inside(HOST):
        failed = host.tpctl("install", "--kuma-dp-user", PROXY_USER, *flags)
        assert host.status()["installed"] is False
    assert failed.returncode == 2, failed.stderr
    assert problem in failed.stderr

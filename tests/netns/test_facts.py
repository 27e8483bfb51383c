"""What the host says changes after the install: `tpctl status` notices, and `tpctl apply` follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.lab import PROXY, PROXY_USER, run, tpctl
from tpctl.record import state
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, PEER_ADDRESS, Layout
from tpctl.rehearsal.namespaces import Namespace, own_mounts
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.policy import Family, Protocol

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
CHANGED = "the host has changed since the install"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return ENGINES[request.param]


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A namespace whose only interface besides lo has no address."""
    made = Namespace()
    with made.inside():
        run(["ip", "link", "set", "lo", "up"])
        yield made
        tpctl("uninstall")
    made.close()


def changes() -> list[str]:
    """What status says has changed."""
    shown = tpctl("status", "--json", check=False)
    found = [problem for problem in json.loads(shown.stdout)["problems"] if problem.startswith(CHANGED)]
    assert not found or shown.returncode == 3
    return found


@pytest.mark.usefixtures("host")
def test_a_new_resolv_conf(tmp_path: Path, engine: tuple[str, ...]) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 192.0.2.53\n")
    tpctl("install", "--kuma-dp-user", PROXY_USER, *engine, "--redirect-dns", "--resolv-conf", str(resolv_conf))
    assert changes() == []
    assert "nothing was changed" in tpctl("apply").stdout
    resolv_conf.write_text("nameserver 192.0.2.54\nnameserver 2001:db8::54\n")
    (said,) = changes()
    assert f"{resolv_conf} names 192.0.2.54, 2001:db8::54 now, and the rules capture DNS queries to 192.0.2.53" in said
    assert "brought up to date" in tpctl("apply").stderr
    assert changes() == []
    for server, verdict in (("192.0.2.53", "pass"), ("192.0.2.54", "redirect"), ("2001:db8::54", "redirect")):
        assert json.loads(tpctl("explain", "dns", "--to", server, "--json").stdout)["action"] == verdict
    resolv_conf.unlink()
    (said,) = changes()
    assert f"{resolv_conf} names 127.0.0.1 now (there is no such file), and the rules" in said
    resolv_conf.mkdir()
    shown = tpctl("status", check=False)
    assert shown.returncode == 3
    assert f"would be refused now: flag --resolv-conf: {resolv_conf} cannot be read" in " ".join(shown.stdout.split())
    applied = tpctl("apply")
    assert "nothing was changed" in applied.stdout
    assert "the policy on record is kept" in applied.stderr


def test_ipv6_comes_later(engine: tuple[str, ...]) -> None:
    """No interface but lo has an IPv6 address while tpctl installs, as at boot before a router has answered."""
    with Lab(Layout()) as lab:
        with lab.inside(HOST):
            Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("1")
            tpctl("install", "--kuma-dp-user", PROXY_USER, *engine)
            assert changes() == []
            Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("0")
            run(["ip", "-6", "addr", "add", "2001:db8:5::2/64", "dev", "eth0", "nodad"])
            run(["ip", "-6", "route", "add", str(PEER_ADDRESS[Family.IPV6]), "dev", "eth0"])
        lab.listen(HOST, Protocol.TCP, 15001, PROXY)
        remote = PEER_ADDRESS[Family.IPV6]
        source = type(remote)("2001:db8:5::2")
        answer = lab.dial(Connection(Direction.OUTBOUND, "tcp", source, remote, 8080, "eth0", uid=1000))
        assert answer.seat is not None
        assert (answer.seat.node, answer.seat.port) == (HOST, 15001)
        with lab.inside(HOST):
            tpctl("uninstall")


@pytest.mark.usefixtures("host")
def test_ipv6_that_is_turned_on_later(engine: tuple[str, ...]) -> None:
    for name in ("all", "default", "lo"):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    installed = tpctl("install", "--kuma-dp-user", PROXY_USER, *engine)
    assert "IPv6 is left alone: it is turned off on this host" in installed.stderr
    assert changes() == []
    for name in ("all", "default", "lo"):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("0")
    (said,) = changes()
    assert "IPv6 is turned on now, and goes past the data plane" in said
    assert "IPv4 and IPv6" in tpctl("apply").stdout + tpctl("status", check=False).stdout
    assert changes() == []


@pytest.mark.usefixtures("host")
def test_a_user_who_was_made_anew(tmp_path: Path) -> None:
    """In a mount namespace of its own, whose /etc/passwd is ours."""
    users = Path("/etc/passwd").read_text()
    passwd = tmp_path / "passwd"
    with own_mounts():
        passwd.write_text(f"{users}envoy:x:4001:4001::/:/bin/false\n")
        run(["mount", "--bind", str(passwd), "/etc/passwd"])
        tpctl("install", "--kuma-dp-user", "envoy")
        assert changes() == []
        passwd.write_text(f"{users}envoy:x:4002:4002::/:/bin/false\n")
        (said,) = changes()
        assert "the data plane's user envoy has the uid 4002 now, and the rules name 4001" in said
        tpctl("apply")
        assert changes() == []
        record = state.load()
        assert record is not None
        assert record.policy.proxy_uid == 4002


@pytest.mark.usefixtures("host")
def test_the_guard_of_the_installs_ssh_session_is_no_change() -> None:
    """A record keeps what the session's guard left alone; whoever asks later comes by another way, or by none."""
    tpctl("install", "--kuma-dp-user", PROXY_USER, "--exclude-inbound-ports", "8080")
    record = state.load()
    assert record is not None
    guarded = json.loads(state.path().read_text())
    guarded["policy"]["inbound"]["excludePorts"] = ["8080", "2222"]
    state.path().write_text(json.dumps(guarded))
    tpctl("apply")
    assert changes() == []
    kept = state.load()
    assert kept is not None
    assert [port.first for port in kept.policy.inbound.exclude_ports] == [8080, 2222]


@pytest.mark.usefixtures("host")
def test_a_record_without_a_configuration() -> None:
    """An older version's: nothing can be resolved again, and an install writes it down."""
    flags = ("--kuma-dp-user", PROXY_USER)
    tpctl("install", *flags)
    document = json.loads(state.path().read_text())
    del document["inputs"]
    state.path().write_text(json.dumps(document))
    assert changes() == []
    assert "nothing was changed" in tpctl("apply").stdout
    assert "unchanged" in tpctl("install", *flags).stdout
    record = state.load()
    assert record is not None
    assert record.inputs is not None
    assert record.inputs["kumaDPUser"]["value"] == PROXY_USER


@pytest.mark.usefixtures("host")
def test_without_iptables_for_ipv6() -> None:
    """A host without an IPv6 address needs no ip6tables; once it has one, status says so."""
    programs = ",".join(f"{name}:{shutil.which(name)}" for name in ("iptables", "iptables-save", "iptables-restore"))
    installed = tpctl("install", "--kuma-dp-user", PROXY_USER, "--iptables-executables", programs)
    assert "this host has no iptables programs for it" in " ".join(installed.stderr.split())
    assert changes() == []
    run(["ip", "link", "add", "d0", "type", "veth", "peer", "name", "d1"])
    run(["ip", "link", "set", "d0", "up"])
    run(["ip", "-6", "addr", "add", "2001:db8::2/64", "dev", "d0", "nodad"])
    (said,) = changes()
    assert "IPv6 is turned on now, and goes past the data plane" in said
    assert "--ip-family-mode ipv4" in tpctl("apply", check=False).stderr

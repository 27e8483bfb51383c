"""`tpctl verify`, by its real command line, and the laboratory it rests on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path

import click
import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.lab import (
    APP,
    PROXY,
    PROXY_USER,
    bare_namespace,
    run,
    snapshot,
    tpctl,
    tpctl_unprivileged,
)
from tests.terminal import on_terminal
from tpctl.record import state
from tpctl.rehearsal import rehearse as rehearsing
from tpctl.rehearsal.lab import NEGATIVE_SECONDS, Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, Layout, stage
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Dns, DnsCapture, Family, NameServer, Policy, PortRange, Protocol, VirtualNetwork
from tpctl.spec.verdict import Action
from tpctl.system.errors import HostError

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup")]
SECONDS = 120.0
"""What takes so long waits for something; on an idle machine it is a second or two."""
THIS_NAMESPACE = Path("/proc/thread-self/ns/net")


def verify(*flags: str, exit_code: int = 0) -> str:
    """Run the command inside a namespace without any rules, and see that it leaves none there."""
    with bare_namespace() as space, space.inside():
        before = snapshot(counters=True)
        done = tpctl("verify", *flags, check=False)
        assert snapshot(counters=True) == before
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if exit_code in (0, 3) else done.stderr


def test_a_given_policy(variant: str) -> None:
    started = time.monotonic()
    report = verify(
        "--kuma-dp-user",
        PROXY_USER,
        "--exclude-inbound-ports",
        "22",
        "--engine",
        "iptables",
        "--iptables-mode",
        variant,
        "--all",
    )
    assert time.monotonic() - started < SECONDS
    lines = report.splitlines()
    (excluded,) = [line for line in lines if line.startswith("IPv4 inbound ssh")]
    assert "tcp 198.19.255.2:22" in excluded
    assert "the port is excluded (i6)" in excluded
    assert "ended as they should" in lines[-1]


def test_a_summary_of_what_went_well() -> None:
    report = verify("--kuma-dp-user", PROXY_USER, "--exclude-inbound-ports", "22", "--engine", "iptables")
    lines = report.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        [f"IPv{family}", direction] for family in (4, 6) for direction in ("inbound", "outbound")
    ]
    assert all(re.search(r"\d+ probes: \d+ redirected, \d+ passed", line) for line in lines[:-1])
    counted = sum(int(line.split()[2]) for line in lines[:-1])
    assert lines[-1] == f"all {counted} probes ended as they should: given policy, iptables (nft)"


def test_lines_fit_the_terminal() -> None:
    argv = [sys.executable, "-m", "tpctl.cli.main", "verify", "--kuma-dp-user", PROXY_USER, "--all"]
    argv += ["--exclude-inbound-ports", "22"]
    with bare_namespace() as space, space.inside():
        said = on_terminal(argv, {"COLUMNS": "72"})
    lines = click.unstyle(said).splitlines()
    assert len(lines) > 60
    assert max(map(len, lines)) <= 72
    assert "ok     IPv4 inbound ssh" in lines
    assert "       203.0.113.10 to tcp 198.19.255.2:22: pass" in lines


def test_json(variant: str, tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 10.0.0.53\nnameserver 2001:db8::53\n")
    flags = ("--kuma-dp-user", PROXY_USER, "--redirect-dns", "--resolv-conf", str(resolv_conf))
    report = json.loads(verify(*flags, "--engine", "iptables", "--iptables-mode", variant, "--json"))
    assert report["ok"] is True
    assert report["policy"] == "given"
    assert report["variant"] == variant
    by_label = {probe["label"]: probe for probe in report["probes"]}
    query = by_label["IPv6 DNS to 2001:db8::53"]
    assert (query["to"], query["expected"], query["rule"]) == ("[2001:db8::53]:53", "redirect 15053", "d3")
    assert query["answerer"] == query["answererExpected"] == "host:15053"
    assert all(probe["ok"] for probe in report["probes"])


def test_the_installed_policy(variant: str) -> None:
    with bare_namespace() as space, space.inside():
        tpctl(
            "install",
            "--kuma-dp-user",
            PROXY_USER,
            "--exclude-inbound-ports",
            "2222",
            "--engine",
            "iptables",
            "--iptables-mode",
            variant,
        )
        try:
            report = json.loads(tpctl("verify", "--json").stdout)
        finally:
            tpctl("uninstall")
    assert (report["policy"], report["variant"], report["ok"]) == ("installed", variant, True)
    assert "IPv6 inbound, excluded port 2222" in [probe["label"] for probe in report["probes"]]


def test_nothing_is_installed() -> None:
    assert "nothing is installed" in verify(exit_code=2)


def test_bad_input() -> None:
    assert "8o" in verify("--kuma-dp-user", PROXY_USER, "--exclude-inbound-ports", "8o", exit_code=2)


def test_without_root() -> None:
    done = tpctl_unprivileged("verify", "--kuma-dp-user", PROXY_USER)
    assert done.returncode == 2
    assert "needs root" in done.stderr


def test_help_has_an_example() -> None:
    assert "tpctl verify --kuma-dp-user" in tpctl("verify", "--help").stdout


def test_a_kernel_that_does_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The policy that is judged excludes a port, the one that is carried out does not: exit code 3."""
    from tpctl.cli.commands import verify as verify_command
    from tpctl.engines import registry

    original = registry.select

    def sabotaged(options: EngineOptions) -> object:
        selection = original(options)
        engine = selection.engine
        planned = engine.plan

        def plan(policy: Policy) -> object:
            return planned(dataclasses.replace(policy, inbound=type(policy.inbound)()))

        monkeypatch.setattr(engine, "plan", plan, raising=False)
        return selection

    monkeypatch.setattr(registry, "select", sabotaged)
    arguments = ["--kuma-dp-user", PROXY_USER, "--exclude-inbound-ports", "22,5000-5003"]
    arguments += ["--failures", "--engine", "iptables"]
    assert verify_command.command.main(arguments, standalone_mode=False) == 3
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if "WRONG" in line and "probes:" not in line]
    assert wrong
    assert all(":22 " in line or ":5000 " in line or ":5003 " in line for line in wrong)
    assert "host:15006 answered" in wrong[0]
    assert f"{len(wrong)} of" in lines[-1]


def test_a_rehearsal_is_quick() -> None:
    started = time.monotonic()
    assert rehearsing.rehearse(Policy(PROXY), EngineOptions("iptables")).ok
    assert time.monotonic() - started < SECONDS


def test_the_kernel_removes_everything_after_a_kill() -> None:
    """The namespaces are held by file descriptors of the process alone."""
    script = (
        "import os, signal\n"
        "from tpctl.record import state\n"
        "from tpctl.rehearsal.lab import Lab\n"
        "from tpctl.rehearsal.layout import HOST, Layout\n"
        "lab = Lab(Layout())\n"
        "with lab.inside(HOST):\n"
        "    print(state.namespace_key(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT_DIRECTORY)
    assert done.returncode == -signal.SIGKILL, done.stderr
    key = done.stdout.strip()
    assert key.startswith("netns-")
    assert key not in _held_namespaces()


def _held_namespaces() -> set[str]:
    """Those that have a process or a name, as `state.namespace_key` calls them: inode numbers are given again."""
    found = {}
    for path in (*Path("/proc").glob("[0-9]*/ns/net"), *Path("/run/netns").glob("*")):
        with contextlib.suppress(OSError, HostError), path.open("rb") as namespace:
            inode = os.fstat(namespace.fileno()).st_ino
            if inode not in found:
                found[inode] = _key_of(namespace.fileno())
    return set(found.values())


def _key_of(namespace: int) -> str:
    space = Namespace.__new__(Namespace)
    space.fd = namespace
    with space.inside():
        return state.namespace_key()


def test_the_process_comes_back_after_an_error() -> None:
    here = THIS_NAMESPACE.stat().st_ino
    space = Namespace()
    try:
        with pytest.raises(ZeroDivisionError), space.inside(APP):  # noqa: PT012 - the block is what is tested
            assert THIS_NAMESPACE.stat().st_ino != here
            assert os.geteuid() == APP
            raise ZeroDivisionError
        assert THIS_NAMESPACE.stat().st_ino == here
        assert os.geteuid() == 0
    finally:
        space.close()


def test_no_privilege_to_make_namespaces() -> None:
    os.seteuid(PROXY)
    try:
        with pytest.raises(HostError, match="root"):
            Namespace()
    finally:
        os.seteuid(0)


def test_answers_without_any_rules() -> None:
    bridge = VirtualNetwork("br+", ip_network("172.30.0.0/16"))
    layout = stage(Policy(PROXY, virtual_networks=(bridge,))).layout
    host = HOST_ADDRESS[Family.IPV4]
    with Lab(layout) as lab:
        for protocol in Protocol:
            for connection, who in (
                (layout.outgoing(protocol, ip_address("192.0.2.1"), 53, APP), PEER),
                (layout.outgoing(protocol, ip_address("172.30.7.7"), 53, APP), "br0"),
                (layout.outgoing(protocol, ip_address("127.0.0.53"), 53, APP), HOST),
                (layout.arriving(ip_address("192.0.2.1"), host, protocol, 53), HOST),
                (layout.arriving(ip_address("192.0.2.1"), ip_address("172.30.0.2"), protocol, 53), "br0"),
                (layout.arriving(ip_address("172.30.0.9"), ip_address("192.0.2.1"), protocol, 53), PEER),
            ):
                assert lab.dial(connection).outcome in ("refused", "answered")
                lab.serve(connection)
                answer = lab.dial(connection)
                assert str(answer) == f"{who}:53"
                assert answer.source == connection.source


def test_silence_is_a_timeout() -> None:
    with Lab(Layout()) as lab:
        with lab.inside(HOST):
            run(["iptables", "-A", "INPUT", "-p", "tcp", "--dport", "8080", "-j", "DROP"])
        connection = lab.layout.arriving(ip_address("192.0.2.1"), HOST_ADDRESS[Family.IPV4], "tcp", 8080)
        lab.serve(connection)
        started = time.monotonic()
        assert lab.dial(connection, timeout=NEGATIVE_SECONDS).outcome == "timeout"
        assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    ("vnets", "said"),
    [
        ((VirtualNetwork("br0", ip_network("198.19.0.0/16")),), "overlaps"),
        ((VirtualNetwork("br0", ip_network("10.0.0.1/32")),), "too small"),
    ],
)
def test_what_cannot_be_rehearsed_is_said(vnets: Sequence[VirtualNetwork], said: str) -> None:
    rehearsal = rehearsing.rehearse(Policy(PROXY, virtual_networks=tuple(vnets)), EngineOptions("iptables"))
    assert rehearsal.ok
    assert len(rehearsal.notes) == 1
    assert said in rehearsal.notes[0]


def test_scoped_name_servers_get_their_link() -> None:
    server = NameServer(ip_address("fe80::53"), "wlan7")
    policy = Policy(PROXY, dns=Dns(DnsCapture.LISTED, servers=(server,)))
    rehearsal = rehearsing.rehearse(policy, EngineOptions("iptables"))
    (query,) = [result for result in rehearsal.results if result.probe.label == "IPv6 DNS to fe80::53%wlan7"]
    assert query.probe.connection.interface == "wlan7"
    # A query that was redirected would leave by wlan7 and be lost, so it passes.
    assert query.verdict.action is Action.PASS
    assert str(query.answer) == f"{PEER}:53"
    assert rehearsal.ok


def test_ports_next_to_excluded_ranges_are_tried() -> None:
    policy = dataclasses.replace(Policy(PROXY), inbound=type(Policy(PROXY).inbound)(exclude_ports=(PortRange(7, 9),)))
    tried = {
        result.probe.connection.destination_port: result.verdict.action
        for result in rehearsing.rehearse(policy, EngineOptions("iptables")).results
        if result.probe.label.startswith("IPv4 inbound")
    }
    assert {port: tried[port] for port in (6, 7, 9, 10)} == {
        6: Action.REDIRECT,
        7: Action.PASS,
        9: Action.PASS,
        10: Action.REDIRECT,
    }

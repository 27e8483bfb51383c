"""`tpctl explain`."""

from __future__ import annotations

import functools
import json
import socket

import pytest

from tests.unit.cli.commands.conftest import Run
from tpctl.host import cgroups
from tpctl.record import state
from tpctl.spec.policy import Cgroup, Inbound, Policy, PortRange

GIVEN = ["--kuma-dp-user", "nobody"]
CAPTURE_ALL = ["--redirect-all-dns-traffic", "--resolv-conf=/dev/null"]


@pytest.fixture
def explain(tpctl: Run) -> Run:
    """Runs `tpctl explain`; gives exit code, stdout and stderr."""
    return functools.partial(tpctl, "explain")


def answer(explain: Run, *argv: str) -> dict[str, object]:
    """The answer as JSON, for a given policy."""
    code, out, _ = explain(*argv, "--json", *GIVEN)
    assert code == 0
    data: dict[str, object] = json.loads(out)
    return data


def test_outbound(explain: Run) -> None:
    code, out, _ = explain("outbound", "--uid", "1000", "--to", "10.1.2.3:443", *GIVEN)
    assert code == 0
    assert "to 10.1.2.3:443" in out
    assert "uid 1000 (given policy)" in out
    assert "verdict: redirect to port 15001" in out
    assert "everything else that leaves goes to the outbound listener (o7)" in out
    assert "  no   x2  the destination is excluded" in out
    assert "  yes  o7" in out


@pytest.mark.parametrize(
    ("argv", "rule", "port"),
    [
        (["outbound", "--uid", "nobody", "--to", "10.1.2.3:443"], "o5", None),
        (["outbound", "--uid", "1000", "--to", "127.0.0.1:80"], "o4", None),
        (["outbound", "--uid", "1000", "--to", "[::1]:80", "--ip-family-mode=ipv4"], "f1", None),
        (["outbound", "--uid", "1", "--to", "10.1.2.3:80", "--exclude-outbound-ports", "80"], "o1", None),
        (["outbound", "--uid", "1", "--to", "10.1.2.3:80", "--protocol", "udp"], "d0", None),
        (["outbound", "--uid", "1", "--to", "10.1.2.3", "--protocol", "icmp"], "p1", None),
        (["outbound", "--uid", "1", "--to", "10.1.2.3:80", "--state", "midstream"], "n1", None),
        (["outbound", "--uid", "1", "--to", "127.0.0.2:80", "--from", "127.0.0.6", "--interface", "lo"], "o2", None),
        (["inbound", "--from", "10.0.0.9", "--to", "10.0.0.5:8080", "--to-this-host"], "i7", 15006),
        (["inbound", "--from", "10.0.0.9", "--to", "127.0.0.1:8080"], "l1", None),
        (["inbound", "--from", "127.0.0.1", "--to", "127.0.0.1:8080"], "i7", 15006),
        (["outbound", "--uid", "1000", "--to", "10.1.2.3:80", "--bound-to", "eth7", "--engine", "ebpf"], "d1", None),
        (["inbound", "--from", "10.0.0.9:5", "--to", "192.0.2.254:8080", "--to-this-host"], "i7", 15006),
        (["inbound", "--from", "10.0.0.9", "--to", "10.0.0.5:8080", "--forwarded"], "i0", None),
        (
            ["inbound", "--from", "10.0.0.9", "--to", "10.0.0.5:22", "--to-this-host", "--exclude-inbound-ports=22"],
            "i6",
            None,
        ),
        (
            ["inbound", "--from", "10.7.0.9", "--to", "10.8.0.1:53", "--protocol", "udp", "--interface", "br0",
             "--vnet", "br+:10.7.0.0/16"],
            "v1", 15053,
        ),
        (["dns", "--uid", "1", "--to", "10.0.0.53"], "d0", None),
        (["dns", "--uid", "1", "--to", "10.0.0.53", *CAPTURE_ALL], "d3", 15053),
        (["dns", "--uid", "1", "--to", "10.0.0.53", "--tcp", *CAPTURE_ALL],
         "x4", None),
    ],
)  # fmt: skip
def test_verdicts(explain: Run, argv: list[str], rule: str, port: int | None) -> None:
    data = answer(explain, *argv)
    assert (data["rule"], data["port"]) == (rule, port)
    assert data["policy"] == "given"
    assert isinstance(data["steps"], list)
    assert data["steps"][-1]["rule"] == rule


def test_what_is_left_open_is_filled_in(explain: Run) -> None:
    connection = answer(explain, "outbound", "--to", "127.0.0.5:80")["connection"]
    assert isinstance(connection, dict)
    assert (connection["interface"], connection["source"]) == ("lo", "127.0.0.1")
    assert connection["uid"] is not None
    chosen = answer(explain, "outbound", "--to", "127.0.0.5:80", "--interface", "x0", "--from", "10.0.0.1")[
        "connection"
    ]
    assert isinstance(chosen, dict)
    assert (chosen["interface"], chosen["source"]) == ("x0", "10.0.0.1")


def test_the_name_of_a_host(explain: Run) -> None:
    """Every address that it has here is told about."""
    held = list(dict.fromkeys(str(one[4][0]) for one in socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)))
    _, out, _ = explain("outbound", "--uid", "1000", "--to", "localhost:80", *GIVEN)
    assert out.splitlines()[0].endswith(f": {', '.join(held)}")
    assert out.count("verdict: ") == len(held)
    data = answer(explain, "outbound", "--uid", "1000", "--to", "localhost:80")
    assert data["name"] == "localhost:80"
    assert isinstance(data["answers"], list)
    assert [one["connection"]["destination"] for one in data["answers"]] == held
    (family,) = {":" in one for one in held[:1]}
    source = "::1" if family else "127.0.0.1"
    data = answer(explain, "outbound", "--to", "localhost:80", "--from", source)
    assert isinstance(data["answers"], list)
    assert {":" in one["connection"]["destination"] for one in data["answers"]} == {family}


def test_the_installed_policy(explain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Policy(77, inbound=Inbound(include_ports=(PortRange(80),)))
    monkeypatch.setattr(state, "load_policy", lambda: installed)
    code, out, _ = explain("inbound", "--from", "10.0.0.9", "--to", "10.0.0.5:81", "--to-this-host")
    assert code == 0
    assert "(installed policy)" in out
    assert "because: only included ports are redirected (i5)" in out


def test_nothing_installed(explain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "load_policy", lambda: None)
    code, out, err = explain("outbound", "--to", "10.0.0.1:80")
    assert (code, out) == (2, "")
    assert "nothing is installed in this network namespace" in err


def test_zone_is_shown(explain: Run) -> None:
    _, out, _ = explain("dns", "--uid", "1", "--to", "10.0.0.53", *GIVEN, *CAPTURE_ALL)
    assert "verdict: redirect to port 15053, in conntrack zone 2" in out


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["outbound"], "Missing option '--to'"),
        (["inbound", "--to", "10.0.0.1:80"], "Missing option '--from'"),
        (["outbound", "--to", "10.0.0.1"], '--to: "10.0.0.1" has no port; write 10.0.0.1:443'),
        (["outbound", "--to", "fd00::1"], "write [fd00::1]:443"),
        (["outbound", "--to", "example.org"], '"example.org" is no ADDRESS:PORT'),
        (["outbound", "--to", "exa mple:80"], "is no ADDRESS:PORT; write 10.1.2.3:443, [fd00::1]:443 or example.org"),
        (["outbound", "--to", "10.0.0.256:80"], "is no ADDRESS:PORT"),
        (["outbound", "--to", "no-such-host.invalid:80"], 'no address for "no-such-host.invalid"'),
        (["outbound", "--to", "10.0.0.1:0"], '"0" is not a port'),
        (["outbound", "--to", "10.0.0.1:8o"], '"8o" is not a port'),
        (["outbound", "--to", "10.0.0.1:80", "--uid", "no-such-user"], 'there is no user "no-such-user"'),
        (["outbound", "--to", "10.0.0.1:80", "--uid", "4294967295"], "is not within the uids"),
        (["inbound", "--to", "10.0.0.1:80", "--from", "fd00::1"], "--from and --to: fd00::1 is IPv6 and 10.0.0.1 is"),
        (["inbound", "--to", "10.0.0.1:80", "--from", "10.0.0.2", "--redirect-inbound-port=0"], '"0" is not a port'),
        (["outbound", "--to", "[::ffff:10.0.0.1]:80"], "is an IPv4 address written as IPv6; write 10.0.0.1"),
        (["outbound", "--to", "[fd00::1]443"], '"[fd00::1]443" is no ADDRESS:PORT'),
        (["outbound", "--to", "10.0.0.1:80", "--interface", "a b"], '"a b" is not the name of an interface'),
        (["sideways"], "No such command"),
    ],
)  # fmt: skip
def test_bad_questions(explain: Run, argv: list[str], problem: str) -> None:
    code, out, err = explain(*argv, *(GIVEN if argv != ["sideways"] else []))
    assert code == 2
    assert problem in err
    assert out == ""


def test_every_problem_of_a_question_at_once(explain: Run) -> None:
    _, _, err = explain("outbound", "--to", "x", "--from", "y", "--uid", "no-such-user", *GIVEN)
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 3


@pytest.mark.parametrize("direction", ["outbound", "inbound", "dns"])
def test_help(explain: Run, direction: str) -> None:
    code, out, _ = explain(direction, "--help")
    assert code == 0
    assert out.index("Connection:") < out.index("Data plane:")
    assert "tpctl explain outbound --uid 1000" in out
    assert "--dry-run" not in out


def test_the_cgroup_of_the_process(explain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Cgroup("system.slice/app.service", 7)
    monkeypatch.setattr(state, "load_policy", lambda: Policy(5678, cgroup=service))
    monkeypatch.setattr(cgroups, "of_process", lambda _: "user.slice")
    asked = ("outbound", "--uid", "1000", "--to", "10.1.2.3:443")
    for spelling in ("system.slice/app.service/below", "/sys/fs/cgroup/system.slice/app.service"):
        code, out, _ = explain(*asked, "--process-cgroup", spelling)
        assert (code, "(o7)" in out, "cgroup /system.slice/app.service" in out) == (0, True, True)
    _, out, _ = explain(*asked)
    assert "cgroup /user.slice (installed policy)" in out
    assert "only connections of the cgroup system.slice/app.service are redirected (c1)" in out
    _, out, _ = explain("dns", "--uid", "1000", "--to", "10.0.0.53", "--process-cgroup", "user.slice")
    assert "(c1)" in out
    assert "--process-cgroup" in explain(*asked, "--process-cgroup", "a/../b")[2]


def test_without_a_cgroup_in_the_policy_nobody_asks_for_one(explain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "of_process", lambda _: pytest.fail("asked"))
    _, out, _ = explain("outbound", "--uid", "1000", "--to", "10.1.2.3:443", *GIVEN)
    assert "cgroup" not in out

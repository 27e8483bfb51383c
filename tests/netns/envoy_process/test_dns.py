"""DNS beside Envoy, of the same file: asked over UDP and TCP by applications whose queries are redirected."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.exception
import pytest

from tests.extent import takes_long
from tests.netns import lab
from tests.netns.envoy_process.plant import (
    TRANSPORTS,
    WEB,
    Client,
    EnvoyRun,
    application,
    asked,
    configuration,
    load,
    put,
    running,
)
from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import (
    HOST4,
    PEER4,
    PEER6,
    RELAY_UID,
    RELAY_USER,
    Net,
    Server,
    is_running,
    process_status,
    until,
)
from tests.schemas import validated

pytestmark = pytest.mark.root
SERVICE = f"{{port: {WEB}, name: web, protocol: http}}"
OTHER = 15054


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with (
        relay_net.network() as made,
        application(made),
        dns_net.dnsmasq(made, "--host-record=real.test,192.0.2.9"),
    ):
        yield made


def file_for(directory: Path, *listeners: str, more: str = "", zone: str = "192.0.2.1 app.mesh\n") -> str:
    """A file with a listener for DNS, its name servers and its zone; `more` is for the section `dns`."""
    put(directory / "resolv.conf", f"nameserver {PEER4}\n{dns_net.PATIENT}")
    put(directory / "zone", zone)
    section = f"dns: {{resolv_conf: {directory}/resolv.conf, zone_file: {directory}/zone{more}}}\n"
    own = ('{listen: "[::]:15053 ipv6only=off", direction: dns}', *listeners)
    return configuration(SERVICE, more=section) + "".join(f"  - {one}\n" for one in own)


def answered(net: Net) -> int:
    client = Client(net, (HOST4, WEB))
    try:
        return client.get()[0]
    finally:
        client.close()


def status(net: Net, envoy: EnvoyRun, *flags: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "tpctl.cli.main", "status", "--envoy-folder", str(envoy.folder), *flags]
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{net.host}", *argv], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def dns_of(net: Net, envoy: EnvoyRun) -> dict[str, Any]:
    found: dict[str, Any] = validated(status(net, envoy, "--json")[1])["envoy"]["dns"]
    return found


def is_closed(net: Net, port: int) -> bool:
    try:
        net.connect(net.host, ("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_one_file_for_connections_and_dns(net: Net, directory: Path) -> None:
    with running(net, directory, file_for(directory)) as envoy:
        assert answered(net) == 200
        for how in TRANSPORTS:
            assert asked(net, "app.mesh", how) == ["192.0.2.1"]
            assert asked(net, "real.test", how) == ["192.0.2.9"]
            assert asked(net, "app.mesh", how, (PEER6, 53)) == ["192.0.2.1"]
        pid = envoy.state()["dns_pid"]
        found = process_status(pid)
        assert set(found["Uid"].split()) == {str(RELAY_UID)}
        assert {found[name] for name in ("CapPrm", "CapEff", "CapAmb", "CapBnd")} == {"0" * 16}
        assert found["NoNewPrivs"] == "1"
        assert dns_of(net, envoy) == {"listens": ["[::]:15053"], "answers": True, "pid": pid, "starts": 1}
        code, text = status(net, envoy)
        assert code == 0
        assert f"pid {pid} answers [::]:15053, started once" in text
    assert not is_running(pid)
    assert not list(envoy.folder.iterdir())


def test_under_the_rules_that_tpctl_installs(directory: Path) -> None:
    """They reset what anybody but the data plane's user sends to its own ports, also on this host (g1)."""
    with (
        relay_net.network(redirect=False, passthrough6=False) as net,
        application(net),
        dns_net.dnsmasq(net, "--host-record=real.test,192.0.2.9"),
        running(net, directory, file_for(directory)) as envoy,
    ):
        with net.inside(net.host):
            dns_flags = ("--redirect-all-dns-traffic", "--redirect-dns-tcp")
            lab.tpctl("install", "--kuma-dp-user", RELAY_USER, "--engine", "nftables", *dns_flags)
        try:
            assert answered(net) == 200
            for how in TRANSPORTS:
                assert asked(net, "app.mesh", how) == ["192.0.2.1"]
                assert asked(net, "real.test", how) == ["192.0.2.9"]
            code, text = status(net, envoy)
            assert code == 0, text
            assert f"pid {envoy.state()['dns_pid']} answers [::]:15053" in text
            with net.inside(net.host):
                checked = lab.tpctl("envoy", "check", str(envoy.file))
            assert "warning" not in checked.stderr
        finally:
            with net.inside(net.host):
                lab.tpctl("uninstall")


def test_a_reload_reaches_both(net: Net, directory: Path) -> None:
    """Applications ask all the time, and no query is lost, whatever changes about the listener that they reach."""
    text = file_for(directory)
    put(directory / "zone2", "192.0.2.2 app.mesh\n")
    with running(net, directory, text) as envoy:
        pid = envoy.state()["dns_pid"]
        with load() as asking:
            asking.add(lambda: asked(net, "real.test", "UDP"), "UDP")
            asking.add(lambda: asked(net, "real.test", "TCP"), "TCP")
            asking.goes_on()
            with envoy.taken("DNS is answered as the file says"):
                envoy.file.write_text(
                    text.replace("/zone}", "/zone2}").replace("name: web", "name: web, real_ip_header: X-Who")
                    + f'  - {{listen: "127.0.0.1:{OTHER}", direction: dns}}\n'
                )
            until(lambda: asked(net, "app.mesh") == ["192.0.2.2"])
            for how in TRANSPORTS:
                assert asked(net, "app.mesh", how, ("127.0.0.1", OTHER)) == ["192.0.2.2"]
            client = Client(net, (HOST4, WEB))
            # Each of Envoy's threads has it a moment later.
            until(lambda: "x-who" in client.get(keep=False)[1]["headers"])
            with envoy.taken("DNS is answered as the file says"):
                envoy.file.write_text(text)
                envoy.send(signal.SIGHUP)
            until(lambda: asked(net, "app.mesh") == ["192.0.2.1"])
            until(lambda: is_closed(net, OTHER))
        assert envoy.state()["dns_pid"] == pid


def test_the_listener_goes_and_comes_back(net: Net, directory: Path) -> None:
    text = file_for(directory)
    with running(net, directory, text) as envoy:
        pid = envoy.state()["dns_pid"]
        with envoy.taken("DNS is not answered any more"):
            envoy.file.write_text(configuration(SERVICE))
        until(lambda: not is_running(pid))
        assert is_closed(net, 15053)
        until(lambda: dns_of(net, envoy) is None)
        with envoy.taken("DNS is answered as the file says"):
            envoy.file.write_text(text)
        for how in TRANSPORTS:
            assert asked(net, "app.mesh", how) == ["192.0.2.1"]
        assert answered(net) == 200


def test_a_killed_process_is_replaced_and_no_later_query_is_lost(net: Net, directory: Path) -> None:
    """The sockets are the supervisor's too: queries wait in them."""
    with running(net, directory, file_for(directory)) as envoy:
        first, of_envoy = envoy.state()["dns_pid"], envoy.envoy()
        os.kill(first, signal.SIGKILL)
        until(lambda: not is_running(first))
        for how in TRANSPORTS:
            assert asked(net, "app.mesh", how) == ["192.0.2.1"]
        until(lambda: envoy.state()["dns_pid"] not in (0, first))
        assert envoy.envoy() == of_envoy
        assert answered(net) == 200
        assert dns_of(net, envoy)["starts"] == 2
        os.kill(of_envoy, signal.SIGKILL)  # and the other way round
        envoy.wait_for("Envoy has died and is started again")
        for how in TRANSPORTS:
            assert asked(net, "app.mesh", how) == ["192.0.2.1"]


def test_everything_ends_with_the_supervisor(net: Net, directory: Path) -> None:
    envoy = EnvoyRun(net, directory, file_for(directory))
    envoy.wait_for("ready")
    pids = (envoy.envoy(), envoy.state()["dns_pid"])
    envoy.process.kill()
    envoy.process.wait()
    until(lambda: not any(map(is_running, pids)))
    code, text = status(net, envoy)
    assert code == 3
    assert "has ended unexpectedly" in text
    with running(net, directory, envoy.file.read_text()):
        assert asked(net, "app.mesh") == ["192.0.2.1"]


def test_dns_is_answered_until_the_last_connection_has_ended(net: Net, directory: Path) -> None:
    envoy = EnvoyRun(net, directory, "drain_timeout: 10m\n" + file_for(directory))
    envoy.wait_for("ready")
    pids = (envoy.envoy(), envoy.state()["dns_pid"])
    server = Server(net.listen(net.host, (HOST4, 9100)), relay_net.echo)
    try:
        with net.connect(net.peer, (HOST4, 9100)) as stream:
            stream.sendall(b"hello")
            assert stream.recv(5, socket.MSG_WAITALL) == b"hello"
            envoy.send(signal.SIGTERM)
            envoy.wait_for("draining", seconds=600.0)
            for how in TRANSPORTS:
                assert asked(net, "real.test", how) == ["192.0.2.9"]
        assert envoy.exit_code() == 0, envoy.log_text()
    finally:
        server.close()
    assert not any(map(is_running, pids))
    assert not list(envoy.folder.iterdir())


def test_what_cannot_be_had_changes_nothing(net: Net, directory: Path) -> None:
    """A port that somebody else has; and one that is free, of an update that Envoy refuses."""
    text = file_for(directory)
    listener = f'  - {{listen: "127.0.0.1:{OTHER}", direction: dns}}\n'
    with running(net, directory, text) as envoy:
        with net.inside(net.host):
            other = socket.create_server(("127.0.0.1", OTHER))
        with other:  # until the file does not ask for it any more: it would be tried again
            with envoy.taken("the configuration is invalid, the old one stays"):
                envoy.file.write_text(text + listener)
            until(lambda: f"TCP port {OTHER} of 127.0.0.1" in str(envoy.state()["problems"]))
            assert status(net, envoy)[0] == 3
            with envoy.taken():
                envoy.file.write_text(text)
        with net.inside(net.host):
            other = socket.create_server(("0.0.0.0", 15009))
        with other, envoy.taken("Envoy has refused an update, the old configuration stays"):
            envoy.file.write_text(text + listener + '  - {listen: "0.0.0.0:15009", direction: outbound}\n')
        assert is_closed(net, OTHER)
        for how in TRANSPORTS:
            assert asked(net, "app.mesh", how) == ["192.0.2.1"]
        with envoy.taken("Envoy serves what the file says"):
            envoy.file.write_text(text + listener)
        for how in TRANSPORTS:
            assert asked(net, "app.mesh", how, ("127.0.0.1", OTHER)) == ["192.0.2.1"]


def test_a_port_moves_between_envoy_and_dns_in_one_step(net: Net, directory: Path) -> None:
    """There and back, all or nothing: while somebody else has another port of the same file, it stays where it is."""
    plain = file_for(directory)
    of_dns = f'  - {{listen: "[::]:{OTHER} ipv6only=off", direction: dns}}\n'
    of_envoy = f'  - {{listen: "[::]:{OTHER} ipv6only=off", direction: outbound, upstream: "{HOST4}:{WEB}"}}\n'
    more_dns = '  - {listen: "127.0.0.1:15055", direction: dns}\n'
    more_envoy = '  - {listen: "127.0.0.1:15055", direction: outbound}\n'

    def is_envoys() -> bool:
        with net.connect(net.host, ("127.0.0.1", OTHER)) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return relay_net.read_all(sock).startswith(b"HTTP/1.")

    def answers() -> bool:
        where = ("127.0.0.1", OTHER)
        try:
            return all(asked(net, "app.mesh", how, where) == ["192.0.2.1"] for how in TRANSPORTS)
        except (OSError, EOFError, dns.exception.DNSException):
            return False  # each of Envoy's threads leaves a port a moment later

    with running(net, directory, plain + of_envoy) as envoy:
        first = envoy.envoy()
        for _ in range(2):
            until(is_envoys)
            with net.inside(net.host):
                other = socket.create_server(("127.0.0.1", 15055))
            with other:
                with envoy.taken("the configuration is invalid, the old one stays"):
                    envoy.file.write_text(plain + of_dns + more_dns)
                assert is_envoys()
            with envoy.taken("DNS is answered as the file says"):
                envoy.file.write_text(plain + of_dns)
            until(answers)
            with net.inside(net.host):
                other = socket.create_server(("127.0.0.1", 15055))
            with other:
                with envoy.taken("Envoy has refused an update, the old configuration stays"):
                    envoy.file.write_text(plain + of_envoy + more_envoy)
                until(answers)
            with envoy.taken("DNS is answered as the file says"):
                envoy.file.write_text(plain + of_envoy)
            until(is_envoys)
        assert envoy.envoy() == first


def test_a_port_that_is_in_use_at_the_start(net: Net, directory: Path) -> None:
    with net.datagram(net.host, socket.AF_INET, ("0.0.0.0", 15053)):
        envoy = EnvoyRun(net, directory, file_for(directory))
        assert envoy.exit_code() == 2
    assert "UDP port 15053 of :: for the dns-15053 listener is in use" in envoy.log_text()
    assert not list(envoy.folder.iterdir())


def test_figures_of_dns_have_an_address_of_their_own(net: Net, directory: Path) -> None:
    text = "metrics: 127.0.0.1:9902\n" + file_for(directory, more=", metrics: 127.0.0.1:9903")

    def figures(port: int) -> str:
        with net.connect(net.host, ("127.0.0.1", port)) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return relay_net.read_all(sock).decode()

    with running(net, directory, text):
        assert asked(net, "app.mesh") == ["192.0.2.1"]
        until(lambda: 'tpctl_relay_dns_total{kind="local"} 1' in figures(9903))
        assert "envoy_server_live" in figures(9902)


def test_a_process_that_is_replaced_while_the_zone_is_not_in_order(net: Net, directory: Path) -> None:
    """Its own names get no answer until it is, all others do, and the file is not served anew."""
    with running(net, directory, file_for(directory)) as envoy:
        first = envoy.state()["dns_pid"]
        put(directory / "zone", "nonsense\n")
        os.kill(first, signal.SIGKILL)
        envoy.wait_for("the DNS zone file is unusable, its names are not answered")
        for how in TRANSPORTS:
            assert asked(net, "real.test", how) == ["192.0.2.9"]
            assert asked(net, "app.mesh", how) == []
        put(directory / "zone", "192.0.2.3 app.mesh\n")
        until(lambda: asked(net, "app.mesh") == ["192.0.2.3"])


def test_dns_of_the_same_file_beside_another_envoy(net: Net, directory: Path) -> None:
    file = directory / "envoy.yaml"
    file.write_text(file_for(directory))
    with relay_net.relay(net, directory, "--config", str(file), "--only", "dns") as relay:
        for how in TRANSPORTS:
            assert asked(net, "app.mesh", how) == ["192.0.2.1"]
        assert is_closed(net, 15006)
        file.write_text(file_for(directory, f'{{listen: "127.0.0.1:{OTHER}", direction: dns}}'))
        relay.process.send_signal(signal.SIGHUP)
        relay.wait_for("the configuration was reloaded")
        for how in TRANSPORTS:
            assert asked(net, "app.mesh", how, ("127.0.0.1", OTHER)) == ["192.0.2.1"]


@takes_long
def test_a_process_that_hangs_is_replaced(net: Net, directory: Path) -> None:
    with running(net, directory, file_for(directory)) as envoy:
        first = envoy.state()["dns_pid"]
        envoy.send(signal.SIGSTOP)  # or it might be replaced while it is asked
        os.kill(first, signal.SIGSTOP)
        try:
            code, text = status(net, envoy)
        finally:
            envoy.send(signal.SIGCONT)
        assert code == 3
        for how in TRANSPORTS:
            assert f"pid {first} does not answer DNS at 127.0.0.1:15053 over {how}" in text
        envoy.wait_for("a worker hangs and is killed", pid=first)
        assert asked(net, "app.mesh") == ["192.0.2.1"]
        until(lambda: envoy.state()["dns_pid"] not in (0, first))
        assert status(net, envoy)[0] == 0

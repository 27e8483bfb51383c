"""`tpctl envoy run` from its start to its end: crashes, reloads, what it refuses, its rights and its limits."""

from __future__ import annotations

import contextlib
import http.client
import os
import pwd
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.extent import takes_long
from tests.netns.envoy_process.plant import (
    METRICS,
    WEB,
    Client,
    EnvoyRun,
    application,
    configuration,
    descriptors_of,
    put,
    running,
)
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import (
    HOST,
    HOST4,
    HOST6,
    PATIENCE,
    RELAY_UID,
    Net,
    Server,
    is_running,
    process_status,
    until,
)

pytestmark = pytest.mark.root
WEB_SERVICE = f"{{port: {WEB}, name: web, protocol: http}}"
GUARDED = f"{{port: {WEB}, name: web, protocol: http, origin_verify: {{header: X-Origin, secrets: [current]}}}}"


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network() as made, application(made):
        yield made


def answered(net: Net, host: str = HOST4, **headers: str) -> int:
    client = Client(net, (host, WEB))
    try:
        return client.get(headers=headers)[0]
    finally:
        client.close()


def is_served(net: Net) -> bool:
    """Whether a client has its answer, where there may be nobody at this moment."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return answered(net) == 200
    return False


def told(net: Net, host: str = HOST4) -> Any:
    """What the application says of the request."""
    client = Client(net, (host, WEB))
    try:
        return client.get()[1]
    finally:
        client.close()


def secret(directory: Path, text: str = "s3cret") -> Path:
    path = directory / "current"
    put(path, text)
    return path


def replace_by(what: str, path: Path) -> None:
    """Have something else in a file's place."""
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    if what == "empty":
        put(path, "")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")


def guarded(path: Path) -> str:
    return configuration(GUARDED, more=f"secrets: {{current: {{file: {path}}}}}\n")


def test_a_killed_envoy_is_started_again_at_once(net: Net, directory: Path) -> None:
    with running(net, directory, configuration(WEB_SERVICE)) as envoy:
        assert [answered(net, host) for host in (HOST4, HOST6)] == [200, 200]
        first = envoy.envoy()
        os.kill(first, signal.SIGKILL)
        until(lambda: not is_running(first))
        until(lambda: is_served(net))
        died = envoy.wait_for("Envoy has died and is started again", how="it was ended by SIGKILL")
        assert died["seconds"] == 0
        until(lambda: envoy.envoy() not in (0, first))


def test_rights_and_places(net: Net, directory: Path) -> None:
    """Envoy is the data plane's user without capabilities, and its folder and admin socket are for nobody else."""
    path = secret(directory)
    with running(net, directory, guarded(path)) as envoy:
        for pid in (envoy.process.pid, envoy.envoy()):
            found = process_status(pid)
            assert set(found["Uid"].split()) == {str(RELAY_UID)}
            assert {found[name] for name in ("CapPrm", "CapEff", "CapAmb", "CapBnd")} == {"0" * 16}
            assert found["NoNewPrivs"] == "1"
        modes = {stat.S_IMODE(place.stat().st_mode) for place in envoy.folder.rglob("*") if place.is_file()}
        assert modes == {0o600}
        assert stat.S_IMODE(envoy.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((envoy.folder / "admin.sock").stat().st_mode) == 0o600
        limits = Path(f"/proc/{envoy.envoy()}/limits").read_text()
        assert "Max core file size        0                    0" in limits
        assert "s3cret" not in Path(f"/proc/{envoy.envoy()}/environ").read_text()
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(envoy.folder / "admin.sock"))
            admin.sendall(b"GET /config_dump?include_eds HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"s3cret" not in relay_net.read_all(admin)


@takes_long
def test_metrics_and_readiness_and_nothing_else_of_the_admin_interface(net: Net, directory: Path) -> None:
    def asked(method: str, path: str) -> int:
        with net.inside(net.host):
            connection = http.client.HTTPConnection("127.0.0.1", METRICS, timeout=30)
            connection.connect()
        connection.request(method, path)
        status = connection.getresponse().status
        connection.close()
        return status

    with running(net, directory, configuration(WEB_SERVICE, more=f"metrics: 127.0.0.1:{METRICS}\n")):
        assert [asked("GET", path) for path in ("/metrics", "/ready")] == [200, 200]
        others = ("/", "/config_dump", "/stats", "/quitquitquit", "/ready/../config_dump", "//config_dump", "/metrics/")
        assert {asked("GET", path) for path in others} == {404}
        assert {asked("POST", path) for path in ("/quitquitquit", "/drain_listeners", "/metrics", "/ready")} == {404}


@takes_long
def test_what_is_not_in_order_leaves_the_old_state(net: Net, directory: Path) -> None:
    with running(net, directory, configuration(WEB_SERVICE)) as envoy:
        good = envoy.file.read_text()
        with envoy.taken("the configuration is invalid, the old one stays"):
            envoy.file.write_text(good.replace("protocol: http", "protocol: htpp"))
        assert "htpp" in str(envoy.state()["problems"])
        assert answered(net) == 200
        first = envoy.envoy()
        os.kill(first, signal.SIGKILL)  # with the file as it is
        until(lambda: envoy.state()["envoy"] not in (0, first))
        envoy.wait_for("Envoy serves", pid=envoy.envoy())
        assert answered(net) == 200
        with envoy.taken():
            envoy.file.write_text(good)
        assert envoy.state()["problems"] == []


def test_a_refused_update_leaves_the_last_good_one(net: Net, directory: Path) -> None:
    """A port that somebody else has: nothing that is looked at before says so, but Envoy cannot open it."""
    with running(net, directory, configuration(WEB_SERVICE)) as envoy:
        good, versions = envoy.file.read_text(), envoy.state()["versions"]
        with net.inside(net.host):
            other = socket.create_server(("0.0.0.0", 15009))
        with other:
            with envoy.taken("Envoy has refused an update, the old configuration stays"):
                envoy.file.write_text(
                    good.replace("name: web", "name: web, real_ip_header: X-Who")
                    + '  - {listen: "0.0.0.0:15009", direction: outbound}\n'
                )
            assert "15009" in str(envoy.state()["problems"])
            assert "ddress already in use" in str(envoy.state()["problems"])
            assert envoy.state()["refused"] == 1
            assert envoy.state()["versions"] == versions
            assert "x-who" not in told(net)["headers"]
        with envoy.taken():
            envoy.send(signal.SIGHUP)
        until(lambda: "x-who" in told(net)["headers"])  # each of Envoy's threads has it a moment later
        assert envoy.state()["problems"] == []


def test_secrets_that_are_emptied_taken_away_or_of_the_wrong_kind(net: Net, directory: Path) -> None:
    """None of that is taken, and the last good secret stays, also in an Envoy that is started anew."""
    path = secret(directory)
    with running(net, directory, guarded(path)) as envoy:
        for change in ("empty", "missing", "directory", "fifo", "device"):
            with envoy.taken("the configuration is invalid, the old one stays"):
                replace_by(change, path)
            assert answered(net, **{"X-Origin": "s3cret"}) == 200
            assert answered(net, **{"X-Origin": ""}) == 403
        first = envoy.envoy()
        os.kill(first, signal.SIGKILL)
        until(lambda: envoy.state()["envoy"] not in (0, first))
        envoy.wait_for("Envoy serves", pid=envoy.envoy())
        assert answered(net, **{"X-Origin": "s3cret"}) == 200
        with envoy.taken():
            path.unlink()
            put(directory / "elsewhere", "another")
            path.symlink_to(directory / "elsewhere")
        # Each of Envoy's threads has it a moment later.
        until(lambda: [answered(net, **{"X-Origin": word}) for word in ("another", "s3cret")] == [200, 403])


def test_sigterm_lets_a_request_finish_and_refuses_new_ones(net: Net, directory: Path) -> None:
    envoy = EnvoyRun(net, directory, configuration(WEB_SERVICE, more="drain_timeout: 30s\n"))
    envoy.wait_for("ready")
    slow = net.connect(net.peer, (HOST4, WEB))
    slow.sendall(b"GET /slow=2 HTTP/1.1\r\nHost: x\r\n\r\n")
    with slow:
        until(lambda: net.on_host("ss", "-Htn", "state", "established", f"( dport = :{WEB} )").strip())
        envoy.send(signal.SIGTERM)
        envoy.wait_for("draining")

        def is_refused() -> bool:
            try:
                net.connect(net.peer, (HOST4, WEB)).close()
            except ConnectionRefusedError:
                return True
            return False

        until(is_refused)
        answer = b""
        while b"\r\n\r\n" not in answer:
            part = slow.recv(65536)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 200")
    assert envoy.exit_code() == 0, envoy.log_text()
    assert not list(envoy.folder.iterdir())


@takes_long
def test_sigterm_waits_for_a_connection_of_tcp_and_not_for_one_of_http_without_a_request(
    net: Net, directory: Path
) -> None:
    def echo(stream: socket.socket) -> None:
        stream.sendall(b"hello")
        assert stream.recv(5, socket.MSG_WAITALL) == b"hello"

    server = Server(net.listen(net.host, (HOST4, 9100)), relay_net.echo)
    envoy = EnvoyRun(net, directory, configuration(WEB_SERVICE, more="drain_timeout: 10m\n"))
    envoy.wait_for("ready")
    idle = Client(net, (HOST4, WEB))
    try:
        assert idle.get()[0] == 200
        with net.connect(net.peer, (HOST4, 9100)) as stream:
            echo(stream)
            envoy.send(signal.SIGTERM)
            envoy.wait_for("draining")
            until(lambda: not net.on_host("ss", "-Hltn", "( sport = :15006 )").strip())
            echo(stream)
            assert envoy.process.poll() is None
        assert envoy.exit_code() == 0, envoy.log_text()
    finally:
        server.close()
        idle.close()


@takes_long
def test_a_second_signal_ends_it_at_once(net: Net, directory: Path) -> None:
    envoy = EnvoyRun(net, directory, configuration(WEB_SERVICE, more="drain_timeout: 10m\n"))
    envoy.wait_for("ready")
    pid = envoy.envoy()
    with net.connect(net.peer, (HOST4, WEB)) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\n")
        until(lambda: net.on_host("ss", "-Htn", "state", "established", "( sport = :15006 )").strip())
        envoy.send(signal.SIGTERM)
        envoy.wait_for("draining")
        envoy.send(signal.SIGTERM)
        assert envoy.exit_code() == 0, envoy.log_text()
    assert not is_running(pid)


def test_envoy_ends_with_its_supervisor(net: Net, directory: Path) -> None:
    """Killed, it leaves nobody behind that holds the ports, and the next one takes the folder over."""
    envoy = EnvoyRun(net, directory, configuration(WEB_SERVICE))
    envoy.wait_for("ready")
    pid = envoy.envoy()
    envoy.process.kill()
    envoy.process.wait()
    until(lambda: not is_running(pid))
    with running(net, directory, configuration(WEB_SERVICE)):
        assert answered(net) == 200


@pytest.mark.parametrize("whose", ["secret", "file"])
def test_files_of_others_are_not_taken_by_root(net: Net, directory: Path, whose: str) -> None:
    path = secret(directory)
    mine = path if whose == "secret" else directory / "envoy.yaml"
    prefix = ("sh", "-c", 'chown 12345 "$0"; exec "$@"', str(mine))
    envoy = EnvoyRun(net, directory, guarded(path), prefix=prefix)
    assert envoy.exit_code() == 2
    assert "belongs to uid 12345" in envoy.log_text()
    assert not envoy.folder.exists()


@takes_long
def test_two_do_not_share_a_folder(net: Net, directory: Path) -> None:
    with running(net, directory, configuration(WEB_SERVICE)) as first:
        second = EnvoyRun(net, directory, first.file.read_text())
        assert second.exit_code() == 2
        assert f"another tpctl envoy run has {first.folder}" in second.log_text()
        assert answered(net) == 200


@takes_long
def test_what_cannot_start_ends_with_the_reason(net: Net, directory: Path) -> None:
    with net.inside(net.host):
        other = socket.create_server(("0.0.0.0", 15006))
    with other:
        envoy = EnvoyRun(net, directory, configuration(WEB_SERVICE))
        assert envoy.exit_code() == 1
    assert "15006" in str(envoy.wait_for("Envoy does not serve")["reason"])


def test_more_clients_than_descriptors(net: Net, directory: Path) -> None:
    """The cap goes by the limit: beyond it, clients are turned away, and Envoy stays what it was."""
    limited = ("prlimit", "--nofile=256:256")
    text = configuration(WEB_SERVICE, more="limits: {connections: 1000}\n")
    with running(net, directory, text, prefix=limited) as envoy:
        envoy.wait_for("limits.connections: 1000 connections need more than the 256 descriptors that there are")
        most = int(envoy.wait_for("ready")["connections"])
        assert 50 < most < 128
        pid = envoy.envoy()
        clients = []
        for _ in range(3 * most):
            with contextlib.suppress(OSError):
                clients.append(net.connect(net.peer, (HOST4, WEB)))
                clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        served = 0
        for client in clients:
            with contextlib.suppress(OSError):
                served += client.recv(12) == b"HTTP/1.1 200"
        assert most // 2 < served <= most
        assert descriptors_of(pid) < 256
        for client in clients:
            client.close()
        until(lambda: is_served(net))
        assert envoy.envoy() == pid


@takes_long
def test_a_transparent_listener_has_the_one_capability_that_it_needs(net: Net, directory: Path) -> None:
    text = """
listeners:
  - {listen: "0.0.0.0:15016 transparent", direction: inbound, source: client}
"""
    with running(net, directory, text) as envoy:
        found = process_status(envoy.envoy())
        assert {int(found[name], 16) for name in ("CapPrm", "CapEff", "CapAmb", "CapBnd")} == {1 << 13}  # CAP_NET_RAW


def test_a_right_that_is_missing_is_named(net: Net, directory: Path) -> None:
    (directory / "run").mkdir(mode=0o700)
    os.chown(directory / "run", RELAY_UID, -1)
    text = 'listeners: [{listen: "0.0.0.0:15016 transparent", direction: inbound}]'
    as_the_user = ("setpriv", f"--reuid={RELAY_UID}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
    envoy = EnvoyRun(net, directory, text, prefix=as_the_user)
    assert envoy.exit_code() == 2
    assert "a listener needs CAP_NET_RAW: start as root with --user" in envoy.log_text()


def test_systemd_hears_of_everything(net: Net, directory: Path) -> None:
    """sd_notify(3), as systemd would hear it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        place = directory / "notify"
        manager.bind(str(place))
        os.chown(place, RELAY_UID, pwd.getpwuid(RELAY_UID).pw_gid)
        manager.settimeout(PATIENCE)

        def heard(state: str) -> None:
            while state not in manager.recv(4096).decode().splitlines():
                pass

        # Ten messages wait for who does not read yet, as while Envoy starts; whatever else comes then is lost.
        prefix = ("env", f"NOTIFY_SOCKET={place}", "WATCHDOG_USEC=4000000")
        with running(net, directory, configuration(WEB_SERVICE), prefix=prefix) as envoy:
            heard("READY=1")
            heard("WATCHDOG=1")
            envoy.send(signal.SIGHUP)
            heard("RELOADING=1")
            heard("READY=1")
            envoy.file.write_text("nonsense")
            envoy.send(signal.SIGHUP)
            heard("RELOADING=1")
            heard("READY=1")
            envoy.send(signal.SIGTERM)
            heard("STOPPING=1")
            assert envoy.exit_code() == 0


@takes_long
def test_secrets_that_systemd_hands_over(net: Net, directory: Path) -> None:
    """LoadCredential= of systemd.exec(5): in a directory of the service's own, which the environment names."""
    credentials = directory / "credentials"
    credentials.mkdir()
    put(credentials / "origin", "s3cret")
    text = configuration(GUARDED, more="secrets: {current: {credential: origin}}\n")
    prefix = ("env", f"CREDENTIALS_DIRECTORY={credentials}")
    with running(net, directory, text, prefix=prefix):
        assert [answered(net, **{"X-Origin": word}) for word in ("s3cret", "other")] == [200, 403]


@takes_long
def test_an_envoy_that_hangs_is_replaced(net: Net, directory: Path) -> None:
    with running(net, directory, configuration(WEB_SERVICE)) as envoy:
        first = envoy.envoy()
        os.kill(first, signal.SIGSTOP)
        envoy.wait_for("Envoy hangs and is killed", pid=first)
        until(lambda: envoy.envoy() not in (0, first))
        assert answered(net) == 200


@takes_long
def test_a_full_disk(net: Net, directory: Path) -> None:
    """What cannot be written is reported, the old state stays, and nothing has to be done but to make room."""
    path = secret(directory)
    (directory / "run").mkdir(mode=0o700)
    relay_net.run("mount", "-t", "tmpfs", "-o", f"size=2m,mode=700,uid={RELAY_UID}", "none", str(directory / "run"))
    try:
        with running(net, directory, guarded(path)) as envoy:
            filling = envoy.folder / "filling"
            with contextlib.suppress(OSError), filling.open("wb") as file:
                while True:
                    file.write(b"x" * 4096)
                    file.flush()
            many = "".join(f"\n      - {{port: {port}, protocol: http}}" for port in range(3000, 3030))
            good = envoy.file.read_text()
            with envoy.taken("an update has not reached Envoy, the old configuration stays"):
                envoy.file.write_text(good.replace("[current]}}", "[current]}}" + many))
            assert answered(net, **{"X-Origin": "s3cret"}) == 200
            before = len(envoy.lines())
            os.kill(envoy.envoy(), signal.SIGKILL)
            envoy.wait_for("Envoy serves", after=before)
            assert answered(net, **{"X-Origin": "s3cret"}) == 200
            with envoy.taken():
                filling.unlink()
            assert answered(net, **{"X-Origin": "s3cret"}) == 200
    finally:
        relay_net.run("umount", str(directory / "run"))


@takes_long
def test_both_families_are_served(net: Net, directory: Path) -> None:
    with running(net, directory, configuration(WEB_SERVICE)):
        for host in HOST.values():
            assert told(net, host)["from"] == ("127.0.0.6" if host == HOST4 else "::6")

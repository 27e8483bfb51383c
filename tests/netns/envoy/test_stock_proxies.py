"""docs/kong-nginx.md: nginx and HAProxy, as Debian has them, behind tpctl's TPROXY rules."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.envoy.application import answer_http, serving
from tests.netns.envoy.scene import curl
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, RELAY_UID, RELAY_USER, Net, until

REFUSED = 7
"""curl's exit code: no connection at all."""
STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
pytestmark = pytest.mark.root
needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy")
needs_nginx = pytest.mark.skipif(
    not (shutil.which("nginx") and STREAM.exists()),
    reason="needs nginx and libnginx-mod-stream; `make test-envoy` installs them",
)
# What systemd does for a unit with Transparent=yes: numbers from socket(7), ip(7) and linux/in6.h.
WITH_TRANSPARENT_SOCKETS = """
import os, socket, sys
kept = []
for family, host, level, option in ((socket.AF_INET, "0.0.0.0", 0, 19), (socket.AF_INET6, "::", 41, 75)):
    one = socket.socket(family)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.setsockopt(level, option, 1)
    one.bind((host, 15006))
    one.listen(511)
    one.set_inheritable(True)
    kept.append(one)
os.environ["NGINX"] = "".join(f"{one.fileno()};" for one in kept)
os.execvp(sys.argv[1], sys.argv[1:])
"""
INHERITED = (sys.executable, "-c", WITH_TRANSPARENT_SOCKETS)
AS_THE_USER = (
    "setpriv", f"--reuid={RELAY_UID}", f"--regid={RELAY_UID}", "--clear-groups", "--bounding-set=-all,+net_raw",
    "--inh-caps=+net_raw", "--ambient-caps=+net_raw",
)  # fmt: skip


def files() -> tuple[str, str, str]:
    """HAProxy's and nginx' two of the page."""
    page = (ROOT_DIRECTORY / "docs/kong-nginx.md").read_text(encoding="utf-8")
    haproxy, stream, web = re.findall(r"```\w*\n(.*?)```", page.partition("## nginx and HAProxy")[2], re.DOTALL)
    return haproxy, stream, web


def tpctl(net: Net, *argv: str) -> str:
    command = ("nsenter", f"--net=/run/netns/{net.host}", sys.executable, "-m", "tpctl.cli.main", *argv)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=relay_net.PATIENCE)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False) as made:
        tpctl(made, "install", "--kuma-dp-user", RELAY_USER, "--inbound-mode", "tproxy", "--redirect-outbound=false",
              "--no-probe")  # fmt: skip
        yield made


@contextlib.contextmanager
def started(net: Net, folder: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the foreground, which listens or has ended."""
    with (folder / "log").open("wb") as log:
        command = ("nsenter", f"--net=/run/netns/{net.host}", *argv)
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        listening = ("ss", "-Hltn", "( sport = :15006 )")
        until(lambda: process.poll() is not None or net.on_host(*listening).count("15006") == 2)
        yield process
    finally:
        process.terminate()
        process.wait()


def nginx(folder: Path, text: str) -> Sequence[str]:
    """The command that serves such a file."""
    text = text.replace("user kuma-dp;", f"user {RELAY_USER} nogroup;").replace("modules/", f"{STREAM.parent}/")
    (folder / "nginx.conf").write_text(f"daemon off; pid {folder}/pid; error_log stderr;\n{text}")
    return ("nginx", "-e", "stderr", "-c", str(folder / "nginx.conf"))


def haproxy(folder: Path, text: str) -> Sequence[str]:
    (folder / "haproxy.cfg").write_text(text)
    return ("haproxy", "-db", "-f", str(folder / "haproxy.cfg"))


def assert_clients_are_seen(net: Net) -> None:
    with serving(net, net.host, 8080, answer_http):
        for host, peer in ((HOST4, PEER4), (HOST6, PEER6)):
            asked = curl(net, net.peer, host, 8080).asked
            assert (asked["peer"], asked["local"]) == (peer, [host, 8080])
            assert curl(net, net.peer, host, 15006).error == REFUSED  # it would dial itself


@pytest.fixture
def folder() -> Iterator[Path]:
    with relay_net.public_directory() as made:
        yield made


@needs_haproxy
def test_haproxy(net: Net, folder: Path) -> None:
    with started(net, folder, *AS_THE_USER, *haproxy(folder, files()[0])) as process:
        assert process.poll() is None, (folder / "log").read_text()
        assert_clients_are_seen(net)
        assert "problem" not in tpctl(net, "status")


@needs_nginx
@pytest.mark.parametrize("which", [1, 2], ids=["stream", "http"])
def test_nginx_with_sockets_that_it_inherits(net: Net, folder: Path, which: int) -> None:
    with started(net, folder, *INHERITED, *nginx(folder, files()[which])) as process:
        assert process.poll() is None, (folder / "log").read_text()
        assert_clients_are_seen(net)
        assert "problem" not in tpctl(net, "status")


@needs_nginx
def test_nginx_by_itself_gets_nothing_and_status_says_so(net: Net, folder: Path) -> None:
    with started(net, folder, *nginx(folder, files()[1])) as process, serving(net, net.host, 8080, answer_http):
        assert process.poll() is None, (folder / "log").read_text()
        for host in (HOST4, HOST6):
            assert curl(net, net.peer, host, 8080).status == 0
        assert "its socket needs IP_TRANSPARENT" in tpctl(net, "status")


@needs_nginx
@pytest.mark.parametrize("which", [1, 2], ids=["stream", "http"])
def test_nginx_has_no_such_parameter(net: Net, folder: Path, which: int) -> None:
    text = files()[which].replace("0.0.0.0:15006;", "0.0.0.0:15006 transparent;")
    with started(net, folder, *nginx(folder, text)) as process:
        assert process.wait(relay_net.PATIENCE) == 1
    assert re.search(r'invalid.*"transparent"', (folder / "log").read_text())


@needs_haproxy
def test_haproxy_that_gives_up_its_rights_itself(net: Net, folder: Path) -> None:
    """Later versions have a setting with which it keeps the one that it needs."""
    version = re.search(r"version (\d+)\.(\d+)", relay_net.run("haproxy", "-v"))
    assert version is not None
    if (int(version[1]), int(version[2])) >= (2, 9):
        pytest.skip("it is about HAProxy before 2.9, with setcap")
    text = f"global\n    user {RELAY_USER}\n    group nogroup\n{files()[0]}"
    with started(net, folder, *haproxy(folder, text)) as process:
        assert process.wait(relay_net.PATIENCE) == 1
    assert "require full privileges, so global.uid cannot be changed" in (folder / "log").read_text()

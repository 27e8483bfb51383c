"""`tpctl status` says whether Envoy serves what the file says."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.extent import takes_long
from tests.netns.envoy_process.plant import WEB, EnvoyRun, configuration, running
from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Authority
from tests.netns.relay.net import Net, is_running, until
from tests.schemas import validated

pytestmark = pytest.mark.root
FILE = configuration(f"{{port: {WEB}, name: web, protocol: http}}")


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network() as made:
        yield made


def status(namespace: str, folder: Path, *flags: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "tpctl.cli.main", "status", "--envoy-folder", str(folder), *flags]
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{namespace}", *argv], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def found(net: Net, envoy: EnvoyRun) -> tuple[int, dict[str, Any]]:
    code, text = status(net.host, envoy.folder, "--json")
    report: dict[str, Any] = validated(text)["envoy"]
    return code, report


def test_all_is_well_and_then_the_file_is_not_in_order(net: Net, directory: Path) -> None:
    with running(net, directory, FILE) as envoy:
        code, report = found(net, envoy)
        assert (code, report["serves"], report["problems"]) == (0, True, [])
        assert report["file"] == str(envoy.file)
        assert report["cds"] and report["lds"]  # noqa: PT018
        code, text = status(net.host, envoy.folder)
        assert f"serves {envoy.file}, started once" in text
        assert status(net.peer, envoy.folder, "--json")[1].count('"envoy": null') == 1  # it is of another namespace
        with envoy.taken("the configuration is invalid, the old one stays"):
            envoy.file.write_text(FILE.replace("protocol", "protocoll"))
        code, text = status(net.host, envoy.folder)
        assert code == 3
        assert f"problem: {envoy.file} is not what Envoy serves: " in text
        assert "protocoll" in text
        with envoy.taken():
            envoy.file.write_text(FILE)
        assert found(net, envoy)[0] == 0


@takes_long
def test_a_refused_update(net: Net, directory: Path) -> None:
    with running(net, directory, FILE) as envoy:
        with net.inside(net.host):
            other = socket.create_server(("0.0.0.0", 15009))
        with other, envoy.taken("Envoy has refused an update, the old configuration stays"):
            envoy.file.write_text(FILE + '  - {listen: "0.0.0.0:15009", direction: outbound}\n')
        code, report = found(net, envoy)
        assert (code, report["serves"], report["refusedUpdates"]) == (3, False, 1)
        assert "ddress already in use" in report["problems"][0]


@takes_long
def test_a_change_that_takes_a_restart(net: Net, directory: Path) -> None:
    with running(net, directory, f"limits: {{connections: 100}}\n{FILE}") as envoy:
        with envoy.taken("a change takes effect when Envoy is started the next time"):
            envoy.file.write_text(f"limits: {{connections: 101}}\n{FILE}")
        until(lambda: found(net, envoy)[1]["needsRestart"])
        code, report = found(net, envoy)
        assert code == 3
        assert "takes effect when Envoy is restarted" in report["problems"][0]
        pid = envoy.envoy()
        os.kill(pid, signal.SIGKILL)
        until(lambda: found(net, envoy)[0] == 0)
        assert found(net, envoy)[1]["connections"] == 101


def test_a_certificate_that_expires_soon(net: Net, directory: Path) -> None:
    certificate, key = Authority(directory, "authority").issue("shown", "DNS:server.test")  # for two days
    service = f"{{port: {WEB}, name: web, protocol: http, ssl: {{certificate: {certificate}, certificate_key: {key}}}}}"
    with running(net, directory, configuration(service)) as envoy:
        code, report = found(net, envoy)
        assert (code, report["serves"]) == (3, True)
        (problem,) = report["problems"]
        said = rf"the certificate {certificate} \(server.test\) expires in (1 day|2 days), at \d{{4}}-"
        assert re.match(said, problem), problem  # two whole days are left for the rest of a second


@takes_long
def test_an_envoy_that_does_not_answer_and_one_that_nobody_looks_after(net: Net, directory: Path) -> None:
    envoy = EnvoyRun(net, directory, FILE)
    envoy.wait_for("ready")
    pid = envoy.envoy()
    os.kill(pid, signal.SIGSTOP)
    code, report = found(net, envoy)
    assert code == 3
    assert f"Envoy (pid {pid}) does not answer" in report["problems"][0]
    envoy.process.kill()
    envoy.process.wait()
    until(lambda: not is_running(pid))
    code, report = found(net, envoy)
    assert code == 3
    assert "has ended unexpectedly" in report["problems"][0]

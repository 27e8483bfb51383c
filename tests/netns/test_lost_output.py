"""A change stands, and its exit code says so, whatever becomes of what the command prints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from shlex import quote

import pytest

from tests.netns.hostile_room import Room, ok, room
from tests.netns.lab import PROXY_USER

pytestmark = pytest.mark.root

TPCTL = f"{quote(sys.executable)} -m tpctl.cli.main"
INSTALL = f"{TPCTL} install --kuma-dp-user {PROXY_USER} --ip-family-mode ipv4"
UNINSTALL = f"{TPCTL} uninstall"
STATUS = f"{TPCTL} status"
UNPRINTED = "cannot be printed: No space left on device"
BROKEN = """
import sys
from tpctl.change import ended
from tpctl.cli import main

def broken() -> None:
    raise {error}

ended.forget = broken
sys.argv = ["tpctl", *sys.argv[1:]]
main.main()
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Room]:
    with room() as made:
        yield made


def bash(host: Room, script: str) -> subprocess.CompletedProcess[str]:
    return host.run("bash", "-c", script)


def test_a_change_whose_report_is_lost_is_a_change(host: Room) -> None:
    before = host.rules()
    done = bash(host, f"{INSTALL} > /dev/full")
    assert (done.returncode, UNPRINTED in done.stderr, "error:" in done.stderr) == (0, True, False)
    assert "table inet tpctl" in host.rules()
    asked = bash(host, f"{STATUS} > /dev/full")
    assert (asked.returncode, UNPRINTED in asked.stderr) == (1, True)
    assert bash(host, f"{STATUS} | true; exit ${{PIPESTATUS[0]}}").returncode == 3, "as if it had been read"
    assert bash(host, f"{UNINSTALL} | true; exit ${{PIPESTATUS[0]}}").returncode == 0
    assert host.rules() == before


def test_notices_that_cannot_be_printed_stop_no_install(host: Room) -> None:
    before = host.rules()
    for redirection in (">&- 2>&- <&-", "> /dev/full 2>&1"):
        assert bash(host, f"{INSTALL} --exclude-outbound-ips 10.0.0.1/8 {redirection}").returncode == 0
        assert "table inet tpctl" in host.rules()
        ok(host.tpctl("uninstall"))
    assert host.rules() == before


@pytest.mark.parametrize("engine", ["nftables", "iptables"])
@pytest.mark.parametrize(
    ("error", "said"), [("MemoryError", "there is not enough memory"), ('KeyError("x")', "internal error (KeyError:")]
)
def test_an_error_that_nobody_foresaw_is_rolled_back_too(host: Room, engine: str, error: str, said: str) -> None:
    ok(host.install("--engine", engine))
    before, record = host.rules(), (host.folder() / "state.json").read_text()
    words = ("install", "--kuma-dp-user", PROXY_USER, "--ip-family-mode", "ipv4", "--exclude-inbound-ports", "22")
    done = host.run(sys.executable, "-c", BROKEN.format(error=error), *words, "--engine", engine)
    assert done.returncode == 1
    assert f"error: {said}" in done.stderr
    assert "the policy that was installed before is carried out again" in done.stderr
    assert done.stderr.count("error:") == 1
    assert host.rules() == before
    assert (host.folder() / "state.json").read_text() == record
    ok(host.tpctl("uninstall"))

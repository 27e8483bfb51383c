"""A program that outlives the tpctl which started it still changes the rules; nobody may think that it is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.crash.scene import Host, Scene
from tests.crash.test_scenarios import NAMES, WRAPPER
from tpctl.rehearsal.cgroup import own_place
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Layout

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup", "interception", "legacy")]

SLOWLY = "touch /run/begun; sleep 3"


def test_the_next_command_waits_for_what_a_killed_one_has_started(tmp_path: Path) -> None:
    with own_place() as place, Lab(Layout()) as lab:
        host = Host(lab, place, tmp_path)
        try:
            scene = Scene(lab, host, "iptables nft")
            host.shell("mkdir /run/scripts")
            for name in NAMES:
                script = WRAPPER.format(restore=SLOWLY)
                host.shell(f"cat > /run/scripts/{name} <<'END'\n{script}END\nchmod +x /run/scripts/{name}")
            programs = ",".join(f"{name}:/run/scripts/{name}" for name in NAMES)
            with lab.inside(HOST):
                install = subprocess.Popen(
                    [*host.beside(), sys.executable, "-m", "tpctl.cli.main", "install", "--kuma-dp-user", "nobody",
                     "--engine", "iptables", "--iptables-executables", programs],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            deadline = time.monotonic() + 300
            while "/run/begun" not in host.files("/run"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(install.pid, signal.SIGKILL)
            install.wait()
            host.ok("uninstall")
            time.sleep(4)
            assert scene.seen() == scene.expected("none"), "the orphan's rules came after the uninstall"
            assert json.loads(host("status", "--json").out)["installed"] is False
        finally:
            host.close()

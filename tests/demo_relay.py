"""The demonstration's relay: the real `tpctl relay`, started on our host."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.hidden import ROOT_DIRECTORY
from tests.netns.lab import PROXY_USER
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST

RELAY_SECONDS = 60.0
"""It compiles a program for the kernel first, which takes long on a busy machine."""
DIAL_SECONDS = 10.0


class Relay:
    """The real relay, as the data plane user, on our host."""

    def __init__(self, lab: Lab, resolv_conf: Path, log: Path) -> None:
        self.log = log
        argv = [sys.executable, "-m", "tpctl.cli.main", "relay", "--user", PROXY_USER, "--access-log"]
        argv += ["--log-format", "json", "--resolv-conf", str(resolv_conf), "--drain-timeout", "1"]
        with lab.inside(HOST), log.open("wb") as output:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT_DIRECTORY
            )
        self._wait_for("ready")

    def _records(self) -> list[dict[str, Any]]:
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _wait_for(self, event: str) -> None:
        deadline = time.monotonic() + RELAY_SECONDS
        while not any(record.get("event") == event for record in self._records()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the relay did not say that it is {event}:\n{self.log.read_text()}")
            time.sleep(0.01)

    def destinations(self, count: int) -> list[str]:
        """The original destinations the relay recovered, once it has logged `count` connections."""
        deadline = time.monotonic() + DIAL_SECONDS
        while True:
            found = [str(record["destination"]) for record in self._records() if record.get("event") == "connection"]
            if len(found) >= count or time.monotonic() > deadline:
                return found
            time.sleep(0.005)

    def stop(self) -> None:
        """End it, as systemd would."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(RELAY_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

"""How tpctl is delivered: man pages, Debian and RPM packages, a release.

Run with .ci on PYTHONPATH, as the Makefile does. Needs a working `tpctl` in this environment (`make venv`) and the
distributions' own programs, nothing else. What it makes lies in dist/ and is the same, byte for byte, each time that it
is made from the same commit.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DIST = CHECKOUT / "dist"
NAME = "tpctl"
SUMMARY = "transparent-proxy host agent"
MAINTAINER = "The tpctl maintainers <maintainers@tpctl.invalid>"
DESCRIPTION = """\
tpctl sends a Linux host's inbound TCP, outbound TCP and DNS traffic through a data plane proxy, transparently to the
applications. The proxy is Envoy, also under kuma-dp, or the small relay that comes with tpctl. It installs nftables or
iptables rules, or eBPF programs, can verify a policy with real connections before it is installed, and takes away
everything that it installed."""


def epoch() -> int:
    """The time that everything is said to be of: SOURCE_DATE_EPOCH, else that of the commit. Raises RuntimeError.

    The files of a source distribution have the time of theirs.
    """
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    unpacked = CHECKOUT / "PKG-INFO"
    if unpacked.exists():
        return int(unpacked.stat().st_mtime)
    command = ["git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no commit tells the time; set SOURCE_DATE_EPOCH: {done.stderr.strip()}")
    return int(done.stdout)

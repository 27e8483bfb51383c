"""Helpers for tests in a scratch laboratory: the real command line, and what the kernel holds, as text."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from tests.hidden import ROOT_DIRECTORY
from tests.netns.relay.net import has_address, until
from tests.schemas import validated
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST
from tpctl.rehearsal.namespaces import Namespace

PROXY_USER = "nobody"
PROXY = 65534
APP = 1000
ROOT = 0

Inside = AbstractContextManager[None]

SAVES = tuple(f"{tool}-{variant}-save" for variant in ("nft", "legacy") for tool in ("iptables", "ip6tables"))


def run(argv: Sequence[str], *, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program in the current namespace."""
    done = subprocess.run(list(argv), input=stdin, capture_output=True, text=True, check=False, cwd=ROOT_DIRECTORY)
    if check and done.returncode != 0:
        raise AssertionError(f"{argv} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def tpctl(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the real command in the current namespace. What it prints as JSON has to be what the schema says."""
    done = run([sys.executable, "-m", "tpctl.cli.main", *arguments], check=check)
    if "--json" in arguments:
        validated(done.stdout)
    return done


UNPRIVILEGED = """
import importlib, os, pkgutil, sys
import tpctl
# A checkout under /root cannot be read later on.
for module in pkgutil.walk_packages(tpctl.__path__, "tpctl."):
    importlib.import_module(module.name)
os.setgroups([])
os.setgid({uid})
os.setuid({uid})
"""


def unprivileged(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as an ordinary user in the current namespace; every module of the agent is imported before."""
    return run([sys.executable, "-c", UNPRIVILEGED.format(uid=PROXY) + code], check=False)


def tpctl_unprivileged(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as an ordinary user."""
    return unprivileged(f"sys.argv = ['tpctl', *{list(arguments)}]\nfrom tpctl.cli.main import main\nmain()\n")


@contextmanager
def installed(lab: Lab, *flags: str) -> Iterator[None]:
    """`tpctl install` in the laboratory's host for the length of the block."""
    with lab.inside(HOST):
        tpctl("install", "--kuma-dp-user", PROXY_USER, "--engine", "iptables", *flags)
    try:
        yield
    finally:
        with lab.inside(HOST):
            tpctl("uninstall")


def without_dates(text: str) -> str:
    """A save without the comments that carry version and date."""
    return re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)


def snapshot(*, counters: bool, policies: bool = True) -> dict[str, str]:
    """Everything of netfilter in the current namespace, by the command that shows it.

    Without ``policies``, what the built-in chains count is left out: on an interface that is up the kernel sends
    by itself (MLD reports, router solicitations), which no test can hold back.
    """
    flags = ["-c"] if counters else []
    shown = {tool: without_dates(run([tool, *flags]).stdout) for tool in SAVES}
    if not counters:
        shown = {tool: re.sub(r"\[\d+:\d+\]", "", text) for tool, text in shown.items()}
    if not policies:
        shown = {tool: re.sub(r"^(:\S+ [A-Z]+) \[\S+\]", r"\1", text, flags=re.M) for tool, text in shown.items()}
    ruleset = run(["nft", "list", "ruleset"]).stdout
    # nft prints counters in the rules of iptables-nft, which the saves above compare.
    shown["nft"] = without_dates(ruleset if counters else re.sub(r"packets \d+ bytes \d+", "", ruleset))
    shown["nft"] = re.sub(r"(?<= \{\n)\t.*?(?=\n\}\n)", _in_order_of_name, shown["nft"], flags=re.S)
    shown["addresses"] = loopback_addresses()
    return shown


def loopback_addresses() -> str:
    """The addresses of lo, a line each. A new one is tentative until a worker of the kernel has come by: left out."""
    return run(["ip", "-o", "address", "show", "dev", "lo"]).stdout.replace(" tentative", "")


def _in_order_of_name(table: re.Match[str]) -> str:
    """The chains and sets of a table. nft lists them in the order in which they were made, which means nothing."""
    return "\n\n".join(sorted(table[0].split("\n\n")))


def checksum(data: bytes) -> int:
    """Of an IP header, or of what TCP and UDP cover, with a zero in its place (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@contextmanager
def bare_namespace() -> Iterator[Namespace]:
    """A namespace with nothing but a loopback interface, where nothing moves that the test did not send."""
    space = Namespace()
    try:
        with space.inside():
            run(["ip", "link", "set", "lo", "up"])
            # Down, so that it sends nothing by itself; the address is there for the tool to see that IPv6 is in use.
            run(["ip", "link", "add", "quiet", "type", "veth", "peer", "name", "far"])
            run(["ip", "-6", "address", "add", "fd77::1/64", "dev", "quiet", "nodad"])
            until(lambda: has_address("fd77::1"))
        yield space
    finally:
        space.close()

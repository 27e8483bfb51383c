"""Helpers for tests in a scratch laboratory: the real command line, and what the kernel holds, as text."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from agent import state
from agent.rehearsal.lab import Lab
from agent.rehearsal.layout import HOST
from agent.rehearsal.namespaces import Namespace

ROOT_DIRECTORY = Path(__file__).resolve().parents[2]
PROXY_USER = "nobody"
PROXY = 65534
APP = 1000
ROOT = 0

TOUCHED: set[str] = set()
"""The namespaces in which the command was run, by the names of their records."""

Inside = AbstractContextManager[None]

SAVES = tuple(f"{tool}-{variant}-save" for variant in ("nft", "legacy") for tool in ("iptables", "ip6tables"))


def run(argv: Sequence[str], *, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program in the current namespace."""
    done = subprocess.run(list(argv), input=stdin, capture_output=True, text=True, check=False, cwd=ROOT_DIRECTORY)
    if check and done.returncode != 0:
        raise AssertionError(f"{argv} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def tpctl(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the real command in the current namespace."""
    TOUCHED.add(state.namespace_key())
    return run([sys.executable, "-m", "agent.cli.main", *arguments], check=check)


UNPRIVILEGED = """
import importlib, os, pkgutil, sys
import agent
# A checkout under /root cannot be read later on.
for module in pkgutil.walk_packages(agent.__path__, "agent."):
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
    return unprivileged(f"sys.argv = ['tpctl', *{list(arguments)}]\nfrom agent.cli.main import main\nmain()\n")


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


def snapshot(*, counters: bool) -> dict[str, str]:
    """Everything of netfilter in the current namespace, by the command that shows it."""
    flags = ["-c"] if counters else []
    shown = {tool: without_dates(run([tool, *flags]).stdout) for tool in SAVES}
    if not counters:
        shown = {tool: re.sub(r"\[\d+:\d+\]", "", text) for tool, text in shown.items()}
    ruleset = run(["nft", "list", "ruleset"]).stdout
    # nft prints counters in the rules of iptables-nft, which the saves above compare.
    shown["nft"] = without_dates(ruleset if counters else re.sub(r"packets \d+ bytes \d+", "", ruleset))
    shown["addresses"] = run(["ip", "-o", "address", "show", "dev", "lo"]).stdout
    return shown


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
        yield space
    finally:
        space.close()

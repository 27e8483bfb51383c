"""What the kernel of this machine lets tests have, asked once for each: what is refused is skipped, with its answer.

A test says what it needs by `@pytest.mark.needs("ebpf")`, or by a word in the name of its file (`test_ebpf_engine.py`)
or of its parameters (`[iptables-legacy]`). What every test with the mark `root` needs, namespaces, it need not say.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tpctl.rehearsal.cgroup import own_groups, own_place
from tpctl.rehearsal.namespaces import Namespace
from tpctl.relay.connections import sockmap
from tpctl.spec.policy import Policy
from tpctl.system.errors import TpctlError

NAMESPACES = "namespaces"
PROXY = 65534
_PTRACE_TRACEME = 0
_SETTING = """
set -e
ip link set lo up
ip link add here type veth peer name there
ip -6 address add fd77::1/64 dev here nodad
for tool in iptables-nft ip6tables-nft; do $tool -t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 15001; done
"""
_TPROXY = "table inet try { chain to { type filter hook prerouting priority mangle; meta l4proto tcp tproxy to :1; }; }"


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """In a network namespace of its own."""
    space = Namespace()
    try:
        with space.inside():
            yield
    finally:
        space.close()


def _run(*argv: str, stdin: str = "") -> None:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise OSError(f"{argv[0]}: {' '.join((done.stderr or done.stdout).split())}")


def _namespaces() -> None:
    if os.geteuid() != 0:
        raise PermissionError("root makes them")
    with _apart():
        _run("unshare", "--mount", "sh", "-c", _SETTING)


def _legacy() -> None:
    with _apart():
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            for table in ("filter", "nat", "mangle", "raw"):
                _run(tool, "--table", table, "--list-rules")


def _cgroup() -> None:
    with own_groups():
        pass


def _ebpf() -> None:
    with own_place() as place, _apart():
        engine = place.engine()
        engine.apply(engine.plan(Policy(PROXY)))
        engine.remove()


def _sockmap() -> None:
    for descriptor in sockmap.load(1):
        os.close(descriptor)


def _conntrack() -> None:
    with _apart():
        _run("conntrack", "--count")


def _tproxy() -> None:
    with _apart():
        _run("nft", "--file", "-", stdin=_TPROXY)


def _ipv6() -> None:
    with socket.socket(socket.AF_INET6) as loopback:
        loopback.bind(("::1", 0))


def _interception() -> None:
    """Calls of another process are stopped by a filter, before they happen (tests/crash/notify.py)."""
    from tests.crash import notify

    if platform.machine() != "x86_64":
        raise OSError("the calls are known by their numbers of x86-64 only")
    _in_child(lambda: notify.watch(notify.program([], {})))


def _ptrace() -> None:
    def ask() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(_PTRACE_TRACEME, 0, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")

    _in_child(ask)


def _in_child(ask: Callable[[], object]) -> None:
    """Ask in a process of its own, which ends with what it was given. Raises OSError as `ask` does."""
    child = os.fork()
    if child == 0:
        answer = 1
        try:
            ask()
            answer = 0
        except OSError as refused:
            answer = refused.errno or 1
        finally:
            os._exit(answer)
    _, status = os.waitpid(child, 0)
    if status:
        raise OSError(os.strerror(os.waitstatus_to_exitcode(status)))


PROBES: dict[str, Callable[[], None]] = {
    NAMESPACES: _namespaces,
    "legacy": _legacy,
    "cgroup": _cgroup,
    "ebpf": _ebpf,
    "sockmap": _sockmap,
    "conntrack": _conntrack,
    "tproxy": _tproxy,
    "ipv6": _ipv6,
    "interception": _interception,
    "ptrace": _ptrace,
}
"""By name, what finds out whether a feature can be had; it raises when not."""


@cache
def refusal(feature: str) -> str | None:
    """Why it cannot be had here; None when it can."""
    try:
        PROBES[feature]()
    except (TpctlError, OSError, subprocess.SubprocessError) as refused:
        return f"no {feature} here: {refused}"
    return None


def needed(item: pytest.Item) -> list[str]:
    """What a test says it needs, in the order in which it is asked for."""
    said = {feature for mark in item.iter_markers("needs") for feature in mark.args}
    unknown = said - PROBES.keys()
    if unknown:
        raise pytest.UsageError(f"{item.nodeid} needs {', '.join(unknown)}; there are {', '.join(PROBES)}")
    if item.get_closest_marker("root"):
        named = f"{item.path.stem} {item.name.partition('[')[2]}"
        said |= {NAMESPACES, *re.findall("[a-z0-9]+", named)} & PROBES.keys()
    return [feature for feature in PROBES if feature in said]


def skip_without(item: pytest.Item) -> None:
    """Skip a test when what it needs is refused here."""
    for feature in needed(item):
        if reason := refusal(feature):
            pytest.skip(reason)

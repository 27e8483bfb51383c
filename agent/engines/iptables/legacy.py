"""The legacy variant: python-iptables (libiptc), one commit a table, under the lock iptables-legacy itself takes."""

from __future__ import annotations

import ctypes.util
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.child import ChildFailedError, in_child
from agent.engine_options import EngineOptions
from agent.engines.iptables import saved
from agent.engines.iptables.backend import TransientError, lacks_cgroup, no_cgroup, read_tables
from agent.engines.iptables.change import Declare, Delete, DeleteChain, Empty, Place, TableChange
from agent.engines.iptables.rule import Option, Rule
from agent.engines.iptables.tools import Tools
from agent.errors import ApplyError, HostError
from agent.policy import Family
from agent.seclusion import in_root

LOCK = Path("/run/xtables.lock")
LOCK_POLL_SECONDS = 0.02

_LIBRARIES = ("/usr/lib/{triplet}", "/usr/lib64", "/usr/lib", "/lib/{triplet}", "/lib64", "/lib")
_LIBRARY_VARIABLES = (
    "XTABLES_LIBDIR", "IPTABLES_LIB_DIR", "IP6TABLES_LIB_DIR", "IPTABLES_LIBDIR", "PYTHON_IPTABLES_XTABLES_VERSION",
)  # fmt: skip
"""libxtables and python-iptables load what lies where these say, in which the caller shall have no part."""


class LegacyBackend:
    """One family of the legacy variant."""

    variant = "legacy"

    def __init__(self, tools: Tools, options: EngineOptions) -> None:
        self.tools = tools
        self.options = options

    def save(self) -> dict[str, saved.SavedTable]:
        """What iptables-legacy-save lists; nothing when no table exists, so that none is created."""
        return read_tables(self.tools)

    def commit(self, changes: tuple[TableChange, ...], *, comments: bool) -> None:
        """Commit the tables in a forked child.

        libxtables keeps the extensions it has loaded in global lists, and python-iptables cannot find REDIRECT for one
        family after it was loaded for the other, so each family gets a process of its own. The child also keeps a crash
        of the C library away from the rollback, and catches what libxtables prints.
        """
        load()
        work = [change for change in changes if change.operations]
        _in_child(lambda: _commit_all(self.tools.family, work, comments))


@contextmanager
def xtables_lock(wait_seconds: float) -> Iterator[None]:
    """Hold the lock of iptables(8) -w: libiptc reads a table, changes it and writes it back whole.

    Raises TransientError when it is still held after `wait_seconds`.
    """
    descriptor = os.open(LOCK, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TransientError(
                        f"another program has held {LOCK} for {wait_seconds:g} s; see --wait"
                    ) from None
                time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def load() -> Any:
    """Import python-iptables. Raises HostError when it, or a library of iptables it needs, does not load.

    Its import looks for libraries with ctypes.util.find_library, which runs ldconfig, gcc and ld some sixty times, for
    0.2 s; it is shown where they are instead. And it loads what a symbolic link of a library's name in the working
    directory stands for, so it is imported where only root can put one.
    """
    directories = [
        Path(pattern.format(triplet=getattr(sys.implementation, "_multiarch", ""))) for pattern in _LIBRARIES
    ]
    extensions = next((found for each in directories if (found := each / "xtables").is_dir()), None)
    for variable in _LIBRARY_VARIABLES:
        os.environ.pop(variable, None)
    if extensions:
        os.environ["XTABLES_LIBDIR"] = str(extensions)
    searching, ctypes.util.find_library = ctypes.util.find_library, lambda name: _find_library(name, directories)
    try:
        with in_root():
            import iptc
    except Exception as error:  # its import raises whatever the C library lookup meets
        raise HostError(
            f"the legacy variant needs python-iptables, which does not load here: {error}; "
            "use --iptables-mode nft where the host has it"
        ) from error
    finally:
        ctypes.util.find_library = searching
    return iptc


def _find_library(name: str, directories: list[Path]) -> str | None:
    """The library with its version: the name without one may be a linker script."""
    found = (path for directory in directories for path in sorted(directory.glob(f"lib{name}.so.*")))
    return next(map(str, found), None)


def _in_child(work: Callable[[], None]) -> None:
    """Run `work` in a forked child. Raises what it raised, as ApplyError, TransientError or HostError."""

    def silent() -> str:
        work()
        return ""

    try:
        in_child(silent)
    except ChildFailedError as failed:
        text = " ".join(str(failed).split())
        if "Resource temporarily unavailable" in text:
            raise TransientError(f"libiptc: {text}") from None
        if lacks_cgroup(text):
            raise no_cgroup(f"libiptc: {text}") from None
        if "can't initialize" in text:
            raise HostError(f"this kernel lacks a table that is needed: libiptc: {text}") from None
        raise ApplyError(f"libiptc: {text}") from None


def _commit_all(family: Family, changes: list[TableChange], comments: bool) -> None:
    for table_change in changes:
        _commit_table(family, table_change, comments)


def _commit_table(family: Family, change: TableChange, comments: bool) -> None:
    iptc = load()
    table_class = iptc.Table if family is Family.IPV4 else iptc.Table6
    # To tell a chain from an extension, python-iptables asks every table for the target, which would create them all.
    table_class.existing_table_names.update({name: name == change.table for name in table_class.ALL})
    table = table_class(change.table, autocommit=False)
    table.refresh()  # a cached handle would show what the table held when it was opened
    for operation in change.operations:
        match operation:
            case Declare(name):
                if table.is_chain(name):
                    table.flush_entries(name)
                else:
                    table.create_chain(name)
            case Delete(name, index, _):
                _delete_entry(table, name, index - 1)
            case Empty(name):
                table.flush_entries(name)
            case DeleteChain(name):
                table.delete_chain(name)
            case Place(name, rule, position):
                built = _build(iptc, family, rule, comments)
                chain = iptc.Chain(table, name)
                if position is None:
                    chain.append_rule(built)
                else:
                    chain.insert_rule(built, position - 1)
    _keep_policy_counters(table)
    table.commit()


def _keep_policy_counters(table: Any) -> None:
    """Carry the counters of the built-in chains' policies over: libiptc, and so iptables-legacy, zeroes them."""
    for chain in table.chains:
        if table.builtin_chain(chain):
            policy, counters = table.get_policy(chain)
            table.set_policy(chain, policy, counters)


def _delete_entry(table: Any, chain: str, number: int) -> None:
    """Delete by place: libiptc has it, python-iptables has no method for it."""
    if table._iptc.iptc_delete_num_entry(chain.encode(), number, table._handle) != 1:
        raise ApplyError(f"cannot delete rule {number + 1} of {chain}: {table.strerror()}")


def _build(iptc: Any, family: Family, rule: Rule, comments: bool) -> Any:
    built = iptc.Rule() if family is Family.IPV4 else iptc.Rule6()
    if rule.protocol:
        built.protocol = rule.protocol
    fields = {"-s": "src", "-d": "dst", "-i": "in_interface", "-o": "out_interface"}
    for flag, criterion in rule.criteria():
        setattr(built, fields[flag], f"!{criterion.value}" if criterion.negated else criterion.value)
    for match in rule.matches:
        _set_options(built.create_match(match.name), match.options)
    if comments and rule.comment:
        built.create_match("comment").set_parameter("comment", rule.comment)
    _set_options(built.create_target(rule.target, goto=rule.goto), rule.target_options)
    return built


def _set_options(extension: Any, options: tuple[Option, ...]) -> None:
    for option in options:
        extension.set_parameter(option.name, ["!", *option.values] if option.negated else list(option.values))

"""python-iptables: the tables of the legacy variant through libiptc, without starting a program.

It knows the inside of libxtables, which changes with the releases of iptables: its version 1.2.0 finds none of the
extensions' options from iptables 1.8.11 on (https://github.com/ldx/python-iptables/issues/353). So nothing is given to
it that it has not been seen to write as it was meant, a moment before, where it acts on no traffic (`obstacle`).
"""

from __future__ import annotations

import ctypes.util
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tpctl.engines.iptables import saved
from tpctl.engines.iptables.backend import TransientError, lacks_cgroup, no_cgroup
from tpctl.engines.iptables.change import Declare, Delete, DeleteChain, Empty, Place, TableChange
from tpctl.engines.iptables.nft_hooks import BUILT_IN
from tpctl.engines.iptables.rule import Option, Rule, parse
from tpctl.engines.iptables.tools import Tools
from tpctl.engines.nftables.nft import EXTENSIONS
from tpctl.spec.policy import Family
from tpctl.system.child import ChildFailedError, in_child
from tpctl.system.errors import ApplyError, HostError
from tpctl.system.networks import into_own_network
from tpctl.system.runner import run
from tpctl.system.seclusion import in_root

TRIAL_SECONDS = 20.0
_INTERFACES = {"-i": "iniface", "-o": "outiface"}
_NAME_BYTES = 16
"""IFNAMSIZ (net/if.h)"""
_TRIAL, _GONE = "TPCTL_TRIAL", "TPCTL_GONE"
"""Chains that no packet comes to."""
_LIBRARIES = ("/usr/lib/{triplet}", "/usr/lib64", "/usr/lib", "/lib/{triplet}", "/lib64", "/lib")
_LIBRARY_VARIABLES = (*EXTENSIONS, "PYTHON_IPTABLES_XTABLES_VERSION")


def commit(family: Family, changes: tuple[TableChange, ...], *, comments: bool) -> None:
    """Carry out the changes, one commit a table, in a forked child.

    libxtables keeps the extensions it has loaded in global lists, and python-iptables cannot find REDIRECT for one
    family after it was loaded for the other, so each family gets a process of its own. The child also keeps a crash of
    the C library away from the rollback, and catches what libxtables prints.

    Raises as `Backend.commit` does.
    """
    load()
    _in_child(lambda: _commit_all(family, changes, comments))


def obstacle(tools: Tools, changes: Iterable[TableChange], *, comments: bool) -> str | None:
    """Why python-iptables is not to carry out these changes on this host; None when it can.

    One rule of each kind is written to the tables of a network namespace that is gone afterwards, and read back with
    iptables-legacy-save. Half of what may go wrong raises nothing: where libxtables has laid out its structures in
    another way, other rules are written than were meant.
    """
    return _outcome(tools, tuple((each.table, tuple(_samples(each))) for each in changes), comments)


def forget_outcomes() -> None:
    """Try again the next time: python-iptables may have come or gone."""
    _outcome.cache_clear()


def load() -> Any:
    """Import python-iptables. Raises HostError when it, or a library of iptables it needs, does not load.

    Its import looks for libraries with ctypes.util.find_library, which runs ldconfig, gcc and ld some sixty times, for
    0.2 s; it is shown where they are instead. It asks distutils for a folder, in whose place setuptools puts itself for
    70 ms; without distutils, as since Python 3.12, it asks sysconfig. And it loads what a symbolic link of a library's
    name in the working directory stands for, so it is imported where only root can put one.
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
        with in_root(), _without("distutils"):
            import iptc
    except ModuleNotFoundError as error:
        if error.name != "iptc":
            raise HostError(f"python-iptables does not load here: {error}") from error
        raise HostError("python-iptables is not installed") from error
    except Exception as error:  # its import raises whatever the C library lookup meets
        raise HostError(f"python-iptables does not load here: {error}") from error
    finally:
        ctypes.util.find_library = searching
    return iptc


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Let a module be missing while another one is imported."""
    modules = cast("dict[str, Any]", sys.modules)
    held = {name: modules[name] for name in (module,) if name in modules}
    modules[module] = None  # so the import system is told (docs.python.org, "The module cache")
    try:
        yield
    finally:
        del modules[module]
        modules.update(held)


def _find_library(name: str, directories: list[Path]) -> str | None:
    """The library with its version: the name without one may be a linker script."""
    found = (path for directory in directories for path in sorted(directory.glob(f"lib{name}.so.*")))
    return next(map(str, found), None)


# -- the trial ---------------------------------------------------------------------------------------------------------


Samples = tuple[tuple[str, tuple[Rule, ...]], ...]
"""Tables, each with the rules that are tried in it."""


def _samples(change: TableChange) -> Iterator[Rule]:
    """A rule of each kind. Rules of a kind differ in values only."""
    seen = set()
    for operation in change.operations:
        if isinstance(operation, Place) and (kind := _kind(operation.rule)) not in seen:
            seen.add(kind)
            yield operation.rule


def _kind(rule: Rule) -> object:
    return (
        rule.protocol,
        tuple((flag, criterion.negated) for flag, criterion in rule.criteria()),
        tuple((match.name, _names(match.options)) for match in rule.matches),
        _is_chain(rule.target) or rule.target,
        rule.goto,
        _names(rule.target_options),
        rule.comment is not None,
    )


def _names(options: tuple[Option, ...]) -> tuple[object, ...]:
    return tuple((option.name, option.negated, len(option.values)) for option in options)


def _is_chain(target: str) -> bool:
    return saved.owner_of_chain(target) is not None or target == saved.DOCKER_DNS_CHAIN


@functools.lru_cache(maxsize=8)
def _outcome(tools: Tools, samples: Samples, comments: bool) -> str | None:
    try:
        load()
        in_child(lambda: _try(tools, samples, comments), seconds=TRIAL_SECONDS)
    except (HostError, ApplyError) as error:
        return str(error)
    except ChildFailedError as failed:
        return f"python-iptables fails with this iptables: {' '.join(str(failed).split())}"
    return None


def _try(tools: Tools, samples: Samples, comments: bool) -> str:
    into_own_network()
    _commit_all(tools.family, [_laid_out(table, rules) for table, rules in samples], comments)
    _commit_all(tools.family, [_tidied(table) for table, _ in samples], comments)
    done = run([tools.save])
    tables = saved.read(done.stdout) if done.ok else {}
    for table, rules in samples:
        listed = tables.get(table, saved.SavedTable(table))
        found = [_compared(parse(rule.text), comments) for rule in listed.rules_of(_TRIAL)]
        for meant, came in itertools.zip_longest((_compared(rule, comments) for rule in rules), found):
            if meant != came:
                raise ApplyError(f"it wrote {came or 'nothing'} for {meant or 'nothing'}")
        if _GONE in listed.chains:
            raise ApplyError("it does not delete chains")
    return ""


def _laid_out(table: str, rules: tuple[Rule, ...]) -> TableChange:
    """The rules in a chain, and what `_tidied` takes away: every kind of operation is among those of the two."""
    chains = sorted({rule.target for rule in rules if _is_chain(rule.target)})
    passes = Rule("RETURN")
    return TableChange(
        table,
        (
            *(Declare(chain) for chain in (*chains, _GONE, _TRIAL)),
            *(Place(_TRIAL, rule) for rule in rules),
            Place(_TRIAL, passes, 1),
            Place(_GONE, passes),
        ),
    )


def _tidied(table: str) -> TableChange:
    return TableChange(table, (Delete(_TRIAL, 1, ""), Empty(_GONE), DeleteChain(_GONE)))


def _compared(rule: Rule, comments: bool) -> str:
    return replace(rule.canonical(), comment=rule.comment).render(comments=comments)


# -- the commit, in the child ------------------------------------------------------------------------------------------


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


def _commit_all(family: Family, changes: Iterable[TableChange], comments: bool) -> None:
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
    """Carry the counters of the built-in chains' policies over: libiptc, and so iptables-legacy, zeroes them.

    python-iptables cannot list the chains where a name of somebody else's is no UTF-8.
    """
    for chain in sorted(BUILT_IN):
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
        if flag in _INTERFACES:
            _compare_whole_name(built.entry.ip if family is Family.IPV4 else built.entry.ipv6, flag, criterion.value)
    for match in rule.matches:
        _set_options(built.create_match(match.name), match.options)
    if comments and rule.comment:
        _set_options(built.create_match("comment"), (Option("comment", (rule.comment,)),))
    _set_options(built.create_target(rule.target, goto=rule.goto), rule.target_options)
    return built


def _compare_whole_name(entry: Any, flag: str, name: str) -> None:
    """Give the mask of an interface's name, which python-iptables makes of 0x01 for IPv6, all its bits.

    The kernel would compare one bit of each letter (ifname_compare_aligned() in linux/netfilter/x_tables.h), and take
    uplink0 for eth+; iptables-save shows nothing of it.
    """
    letters = len(name.encode())
    compared = letters - 1 if name.endswith("+") else letters + 1  # with the zero at its end, unless more may follow
    setattr(entry, f"{_INTERFACES[flag]}_mask", (b"\xff" * compared).ljust(_NAME_BYTES, b"\0"))


def _set_options(extension: Any, options: tuple[Option, ...]) -> None:
    # python-iptables would read back what it has set, with a quoting of its own, and set that: \' for each '.
    extension._update_parameters = lambda: None
    for option in options:
        extension.set_parameter(option.name, ["!", *option.values] if option.negated else list(option.values))

"""Which iptables the host has: the programs of each variant and family, and the variant its own `iptables` command is.

The two variants write to different places in the kernel: "nft" to nf_tables, "legacy" to x_tables. Rules of one are not
seen by the other's tools, so tpctl follows the variant of the host's own command (iptables-nft(8)).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family
from tpctl.system.errors import HostError, InputError
from tpctl.system.input_files import UnusableFileError, judge_program
from tpctl.system.runner import SEARCH_PATH, run

VARIANTS = ("nft", "legacy")


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs of one variant and family, as absolute paths."""

    variant: str
    family: Family
    save: str
    restore: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The variant to use, and why."""

    variant: str
    reason: str
    tools: Mapping[Family, Tools]
    """IPv6 may be missing."""


def command(family: Family) -> str:
    """The name of a family's main command."""
    return "iptables" if family is Family.IPV4 else "ip6tables"


def variant_of(path: str) -> str:
    """The variant of an iptables program, by what it says of itself; versions before 1.8 know only legacy."""
    version = run([path, "--version"]).stdout
    return "nft" if "nf_tables" in version else "legacy"


def find(variant: str, family: Family) -> Tools | None:
    """The programs of a variant and family, or None when the host lacks them."""
    name = command(family)
    named = [_which(f"{name}-{variant}-{verb}") for verb in ("save", "restore")]
    if all(named):
        return Tools(variant, family, *(path for path in named if path))
    plain = [_which(f"{name}-{verb}") for verb in ("save", "restore")]
    main = _which(name)
    if main and all(plain) and variant_of(main) == variant:
        return Tools(variant, family, *(path for path in plain if path))
    return None


def choose(options: EngineOptions) -> Choice:
    """The variant to install with.

    Raises HostError when the host has no iptables (or not the one asked for), InputError for unusable
    --iptables-executables.
    """
    if options.executables:
        return _given(options)
    if options.iptables_mode != "auto":
        return _found(options.iptables_mode, f"--iptables-mode {options.iptables_mode} was given")
    main = _which("iptables")
    if main:
        variant = variant_of(main)
        return _found(variant, f"the host's own iptables command is the {variant} variant")
    for variant in VARIANTS:
        if find(variant, Family.IPV4):
            return _found(variant, f"the host has only iptables-{variant}")
    raise HostError(
        f"no iptables on this host: looked for iptables, iptables-nft and iptables-legacy in {SEARCH_PATH}. "
        "Install the package iptables"
    )


def _located(program: str) -> str:
    """Where a program is that was given by its path, or by a name alone."""
    return program if "/" in program else _which(program) or program


def _which(name: str) -> str | None:
    return shutil.which(name, path=SEARCH_PATH)


def _found(variant: str, reason: str) -> Choice:
    tools = {family: found for family in Family if (found := find(variant, family))}
    if Family.IPV4 not in tools:
        raise HostError(f"this host has no iptables-{variant}-save and iptables-{variant}-restore in {SEARCH_PATH}")
    return Choice(variant, reason, tools)


def _given(options: EngineOptions) -> Choice:
    names = {family: [command(family), f"{command(family)}-save", f"{command(family)}-restore"] for family in Family}
    given = {family: mine for family, mine in names.items() if any(name in options.executables for name in mine)}
    problems = [problem for mine in given.values() for problem in _misgiven(mine, options)]
    if Family.IPV4 not in given:
        problems.append("--iptables-executables: iptables, iptables-save and iptables-restore are missing")
    if problems:  # before anything is run
        raise InputError(problems)
    tools: dict[Family, Tools] = {}
    for family, mine in given.items():
        main, save, restore = (_located(options.executables[name]) for name in mine)
        if "tables v" not in run([main, "--version"]).stdout:
            raise InputError(f"--iptables-executables: {main} is not iptables; give the iptables command itself")
        tools[family] = Tools(variant_of(main), family, save, restore)
    variants = sorted({found.variant for found in tools.values()})
    if len(variants) > 1:
        raise InputError("--iptables-executables: IPv4 and IPv6 use different variants (nft and legacy); use one")
    variant = variants[0]
    if options.iptables_mode not in ("auto", variant):
        raise InputError(
            f"--iptables-mode {options.iptables_mode} contradicts --iptables-executables, "
            f"which are of the {variant} variant"
        )
    return Choice(variant, f"--iptables-executables are of the {variant} variant", tools)


def _misgiven(names: list[str], options: EngineOptions) -> Iterator[str]:
    """What is wrong with the programs of one family."""
    missing = ", ".join(name for name in names if name not in options.executables)
    if missing:
        yield f"--iptables-executables: {missing} is missing; name all of {', '.join(names)}, or none"
        return
    for path in (_located(options.executables[name]) for name in names):
        try:
            judge_program(path)
        except UnusableFileError as bad:
            yield f"--iptables-executables: {path} {bad}"

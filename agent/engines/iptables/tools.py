"""Which iptables the host has: the programs of each variant and family, and the variant its own `iptables` command is.

The two variants write to different places in the kernel: "nft" to nf_tables, "legacy" to x_tables. Rules of one are not
seen by the other's tools, so tpctl follows the variant of the host's own command (iptables-nft(8)).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.engine_options import EngineOptions
from agent.errors import HostError, InputError
from agent.policy import Family
from agent.runner import SEARCH_PATH, run

VARIANTS = ("nft", "legacy")
LEGACY_TABLES = {Family.IPV4: Path("/proc/net/ip_tables_names"), Family.IPV6: Path("/proc/net/ip6_tables_names")}
"""The x_tables tables that exist in this network namespace; reading it loads nothing, unlike asking iptables-legacy."""


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


def legacy_tables_exist(family: Family) -> bool:
    """Whether any x_tables table exists in this network namespace."""
    try:
        return bool(LEGACY_TABLES[family].read_text())
    except OSError:
        return False


def _which(name: str) -> str | None:
    return shutil.which(name, path=SEARCH_PATH)


def _found(variant: str, reason: str) -> Choice:
    tools = {family: found for family in Family if (found := find(variant, family))}
    if Family.IPV4 not in tools:
        raise HostError(f"this host has no iptables-{variant}-save and iptables-{variant}-restore in {SEARCH_PATH}")
    return Choice(variant, reason, tools)


def _given(options: EngineOptions) -> Choice:
    tools: dict[Family, Tools] = {}
    problems = []
    for family in Family:
        names = [command(family), f"{command(family)}-save", f"{command(family)}-restore"]
        given = [name for name in names if name in options.executables]
        if not given:
            continue
        if len(given) < len(names):
            missing = ", ".join(name for name in names if name not in given)
            problems.append(f"--iptables-executables: {missing} is missing; name all of {', '.join(names)}, or none")
            continue
        paths = [options.executables[name] for name in names]
        problems += [
            f"--iptables-executables: {path} is no executable file" for path in paths if not shutil.which(path)
        ]
        if not problems and "tables v" not in run([paths[0], "--version"]).stdout:
            problems.append(f"--iptables-executables: {paths[0]} is no iptables; give the iptables command itself")
        if not problems:
            tools[family] = Tools(variant_of(paths[0]), family, paths[1], paths[2])
    variants = sorted({found.variant for found in tools.values()})
    if len(variants) > 1:
        problems.append("--iptables-executables: IPv4 and IPv6 are of different variants (nft and legacy); use one")
    if not problems and Family.IPV4 not in tools:
        problems.append("--iptables-executables: iptables, iptables-save and iptables-restore are missing")
    if problems:
        raise InputError(problems)
    variant = variants[0]
    if options.iptables_mode not in ("auto", variant):
        raise InputError(
            f"--iptables-mode {options.iptables_mode} contradicts --iptables-executables, "
            f"which are of the {variant} variant"
        )
    return Choice(variant, f"--iptables-executables are of the {variant} variant", tools)

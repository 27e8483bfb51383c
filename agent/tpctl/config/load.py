"""Configuration: defaults < YAML files < environment < flags, with every problem reported in one go.

`load()` reads no fact of the host; names of users, name servers and addresses are looked up by `tpctl.config.resolve`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpctl.config.effective import DEFAULT_ORIGIN, Config
from tpctl.config.options import OPTIONS
from tpctl.config.sources import Findings, Given, from_environment, from_files, from_flags
from tpctl.config.values import EXECUTABLES, BadValueError
from tpctl.spec.exclusions import Interfaces
from tpctl.spec.policy import VirtualNetwork
from tpctl.system.errors import InputError


def load(
    *,
    files: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Sequence[str]] | None = None,
) -> Config:
    """The configuration from its sources.

    `files` are paths (`-` is stdin), later ones override earlier ones; `flags` holds, by option name, every occurrence
    as it was typed. A list replaces the list of a weaker source. Raises InputError with every problem of every source.
    """
    sources = (from_files(files), from_environment(environ or {}), from_flags(flags or {}))
    config, more = _read(sources)
    problems = [problem for source in sources for problem in source.problems] + more
    if config.dataplane_file:
        from tpctl.config import dataplane as config_dataplane  # lazily: few hosts name one here

        dataplane = config_dataplane.read(config.dataplane_file, config.dataplane_variables)
        problems += dataplane.problems
        problems += config_dataplane.contradictions(config, dataplane)
        config, more = _read((dataplane, *sources))
        problems += more
    elif config.dataplane_variables:
        problems.append(f"{config.origin('dataplane_variables')} has no effect without --dataplane-file")
    problems += check(config)
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return config


def of_given(given: Sequence[Given]) -> Config:
    """A configuration of values that were read once before (`tpctl.config.inputs`), without notices.

    Raises InputError with every problem.
    """
    config, problems = _read([Findings(given=list(given))])
    if problems:
        raise InputError(problems)
    return config._replace(notices=())


def _read(sources: Sequence[Findings]) -> tuple[Config, list[str]]:
    """Every given value read, the stronger over the weaker; a value that cannot be read counts as not given."""
    problems: list[str] = []
    values: dict[str, Any] = {option.name: option.default for option in OPTIONS}
    origins = dict.fromkeys(values, DEFAULT_ORIGIN)
    notes: dict[str, list[str]] = {}
    for given in (one for source in sources for one in source.given):
        name, said = given.option.name, list[str]()
        try:
            values[name] = given.option.read(given.raw, said.append)
        except BadValueError as bad:
            problems += [f"{given.origin}: {problem}" for problem in bad.problems]
        else:
            origins[name] = given.origin
            notes[name] = [f"{given.origin}: {note}" for note in said]
    notices = [notice for source in sources for notice in source.notices]
    notices += [note for option_notes in notes.values() for note in option_notes]
    config = Config(**values, origins=origins, notices=tuple(notices))
    return _with_notices(config, _ineffective(config)), problems


def _with_notices(config: Config, more: Iterator[str]) -> Config:
    return config._replace(notices=(*config.notices, *more))


def check(config: Config) -> Iterator[str]:
    """The combinations that cannot be carried out."""
    both = (config.origins["dns_enabled"], config.origins["dns_capture_all"])
    if config.dns_enabled and config.dns_capture_all and all(origin.startswith("flag ") for origin in both):
        yield "flag --redirect-dns and flag --redirect-all-dns-traffic exclude each other; use only one of them"
    yield from _check_ports(config)
    yield from _check_interfaces(config)
    interfaces: dict[tuple[str, int], VirtualNetwork] = {}
    for vnet in config.virtual_networks:
        other = interfaces.setdefault((vnet.interface, vnet.network.version), vnet)
        if other is not vnet:
            yield (
                f"{config.origin('virtual_networks')}: {vnet.interface} is given twice for IPv{vnet.network.version}, "
                f"with {other.network} and {vnet.network}; give each interface one network per family"
            )


def _check_interfaces(config: Config) -> Iterator[str]:
    """A virtual network of which nothing would be left. One that an exclusion only takes a part of is all right."""
    for vnet in config.virtual_networks:
        carried = Interfaces(vnet.interface)
        for excluded in config.exclude_interfaces:
            if excluded.covers(carried):
                yield (
                    f"{config.origin('virtual_networks')}: {vnet} is on an interface that "
                    f"{config.origin('exclude_interfaces')} ({excluded}) leaves alone; drop one of the two"
                )


def _check_ports(config: Config) -> Iterator[str]:
    """Two listeners cannot share a port, and a connection that was redirected must tell which of them it is for."""
    listeners = ["inbound_port", "outbound_port", *(["dns_port"] if config.dns_tcp else [])]
    for index, first in enumerate(listeners):
        for second in listeners[index + 1 :]:
            if getattr(config, first) == getattr(config, second):
                yield (
                    f"{config.origin(first)} and {config.origin(second)}: both are port {getattr(config, first)}; "
                    "the data plane needs a TCP port for each"
                )


def _ineffective(config: Config) -> Iterator[str]:
    """Warnings of values that are possible but have no effect."""
    for direction in ("inbound", "outbound"):
        exclude, include = f"{direction}_exclude_ports", f"{direction}_include_ports"
        if getattr(config, exclude) and getattr(config, include):
            yield f"warning: {config.origin(exclude)} is ignored, because {config.origin(include)} lists all that count"
    if config.dns_capture_all and not config.dns_enabled and config.is_given("dns_enabled"):
        yield (
            f"warning: {config.origin('dns_enabled')} is false but has no effect, because "
            f"{config.origin('dns_capture_all')} turns DNS redirection on"
        )
    if config.dns_tcp and not (config.dns_enabled or config.dns_capture_all or config.virtual_networks):
        yield f"warning: {config.origin('dns_tcp')} has no effect, because DNS is not redirected"
    for tool in ("iptables", "ip6tables"):
        names = [name for name in EXECUTABLES if name.startswith(tool)]
        missing = [name for name in names if name not in config.executables]
        if missing and len(missing) < len(names):
            yield (
                f"warning: {config.origin('executables')}: ignored for {tool}, because {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing; the programs are looked up instead"
            )

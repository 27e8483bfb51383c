"""Configuration: defaults < YAML files < environment < flags, with every problem reported in one go.

`load()` reads no fact of the host; names of users, name servers and addresses are looked up by `agent.resolve`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.config_sources import Findings, from_environment, from_files, from_flags
from agent.config_values import EXECUTABLES, BadValueError
from agent.errors import InputError
from agent.options import BY_NAME, OPTIONS
from agent.policy import Network, Ports, UidExclusion, VirtualNetwork

DEFAULT_ORIGIN = "default"


@dataclass(frozen=True, slots=True)
class Config:
    """The effective value of every option (docs/commands.md), and where each came from."""

    proxy_user: str
    ip_family_mode: str
    dataplane_file: str
    dataplane_variables: Mapping[str, str]
    inbound_enabled: bool
    inbound_port: int
    inbound_exclude_ports: Ports
    inbound_include_ports: Ports
    inbound_exclude_sources: tuple[Network, ...]
    inbound_insert: bool
    inbound_mode: str
    ssh_guard: bool
    outbound_enabled: bool
    outbound_port: int
    outbound_exclude_ports: Ports
    outbound_include_ports: Ports
    outbound_exclude_destinations: tuple[Network, ...]
    outbound_exclude_uids: tuple[UidExclusion, ...]
    outbound_insert: bool
    cgroup: str
    dns_enabled: bool
    dns_capture_all: bool
    dns_port: int
    dns_tcp: bool
    resolv_conf: str
    dns_skip_zone_split: bool
    virtual_networks: tuple[VirtualNetwork, ...]
    drop_invalid: bool
    log_enabled: bool
    log_level: int
    engine: str
    iptables_mode: str
    when_proxy_down: str
    ebpf_enabled: bool
    ebpf_cgroup: str
    ebpf_bpffs: str
    ebpf_instance_ip: str
    ebpf_programs_source_path: str
    ebpf_tc_attach_iface: str
    experimental_engine: bool
    executables: Mapping[str, str]
    comments_disabled: bool
    wait: int
    wait_interval: int
    max_retries: int
    sleep_between_retries: float
    """Seconds."""
    store_firewalld: bool
    firewalld_reload: bool
    verbose: bool
    dry_run: bool
    origins: Mapping[str, str]
    """By attribute: "flag --x", "environment TPCTL_X", "file f: a.b" or "default"."""
    notices: tuple[str, ...]

    def origin(self, name: str) -> str:
        """Where an attribute's value came from, as a message begins; for a default the flag that would change it."""
        where = self.origins[name]
        return f"flag {BY_NAME[name].flag} (its default)" if where == DEFAULT_ORIGIN else where

    def is_given(self, name: str) -> bool:
        """Whether somebody gave the value, as opposed to the default."""
        return self.origins[name] != DEFAULT_ORIGIN


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
        from agent import config_dataplane  # lazily: few hosts name one here

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
    import dataclasses

    return dataclasses.replace(config, notices=(*config.notices, *more))


def check(config: Config) -> Iterator[str]:
    """The combinations that cannot be carried out."""
    both = (config.origins["dns_enabled"], config.origins["dns_capture_all"])
    if config.dns_enabled and config.dns_capture_all and all(origin.startswith("flag ") for origin in both):
        yield "flag --redirect-dns and flag --redirect-all-dns-traffic exclude each other; give one of them"
    yield from _check_ports(config)
    interfaces: dict[tuple[str, int], VirtualNetwork] = {}
    for vnet in config.virtual_networks:
        other = interfaces.setdefault((vnet.interface, vnet.network.version), vnet)
        if other is not vnet:
            yield (
                f"{config.origin('virtual_networks')}: {vnet.interface} is given twice for IPv{vnet.network.version}, "
                f"with {other.network} and {vnet.network}; give each interface one network a family"
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

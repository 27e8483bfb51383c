"""The relay's YAML file: from its text to `Settings`, every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tpctl.config.yaml_text import parse_yaml
from tpctl.relay.settings import section as read
from tpctl.relay.settings.check import contradictions, only_envoy
from tpctl.relay.settings.dns import DnsSettings
from tpctl.relay.settings.listen import Listen, read_address, read_listen
from tpctl.relay.settings.model import (
    DEFAULT_DRAIN_SECONDS,
    DIRECTIONS,
    Acceleration,
    Limits,
    ListenerSettings,
    OriginalDestination,
    Role,
    ServicePorts,
    Settings,
    Source,
    Timeouts,
    TrustedSources,
)
from tpctl.relay.settings.secrets import read_secrets
from tpctl.relay.settings.section import ConfigSection
from tpctl.relay.settings.services import Surroundings, read_services
from tpctl.relay.settings.tls import client_tls, server_tls
from tpctl.relay.settings.upstream import read_upstream
from tpctl.system.errors import InputError
from tpctl.system.input_files import UnusableFileError, read_configuration

MAX_CONNECTIONS = 10**9
_PLACEHOLDER = Listen(read_address("127.0.0.1:1"))
"""Stands for a listener's address that could not be read, while the rest is."""


Refusals = Callable[[Settings], Iterator[str]]
"""What a data plane cannot do, a line for each, beginning with the listener."""


def load(path: str, refusals: Refusals = only_envoy) -> Settings:
    """The settings of a file. Raises InputError with every problem."""
    try:
        tree = parse_yaml(read_configuration(path))
    except UnusableFileError as error:
        raise InputError(f"file {path}: {error}") from None
    return settings_of(tree, path, refusals)


def settings_of(tree: object, path: str, refusals: Refusals = only_envoy) -> Settings:
    """The settings that a parsed file stands for. Raises InputError with every problem.

    `refusals` are those of the data plane that shall serve it: by default the relay's.
    """
    problems: list[str] = []
    section = ConfigSection(tree, f"file {path}: ", problems)
    if tree is None:
        problems.append(f"file {path}: is empty; it needs listeners")
    defaults = _Defaults(section)
    dns = section.section("dns")
    settings = Settings(
        listeners=_listeners(section, defaults),
        dns_metrics=dns.take("metrics", read_address, None),
        dns=_dns(dns),
        workers=section.take("workers", read.workers, 1),
        drain_seconds=section.take("drain_timeout", read.seconds, DEFAULT_DRAIN_SECONDS),
        access_log=section.take("access_log", read.flag, False),
        metrics=section.take("metrics", read_address, None),
        limits=_limits(section, Limits()),
        user=section.take("user", read.text, None),
        accelerate=Acceleration(section.take("accelerate", read.one_of(*Acceleration), Acceleration.OFF)),
        secrets=defaults.secrets,
    )
    section.finish()
    problems += (f"file {path}: {problem}" for problem in refusals(settings))
    if not problems:
        problems += (f"file {path}: {problem}" for problem in contradictions(settings))
    if problems:
        raise InputError(problems)
    return settings


class _Defaults:
    """What holds for every listener that does not say otherwise."""

    def __init__(self, section: ConfigSection) -> None:
        self.timeouts = _timeouts(section, Timeouts())
        self.trusted_ips = section.take("trusted_ips", read.trusted, TrustedSources())
        self.secrets = read_secrets(section)


def _listeners(section: ConfigSection, defaults: _Defaults) -> tuple[ListenerSettings, ...]:
    trees = section.items("listeners")
    if not trees and not section.problems:
        section.complain("listeners", "there is none; give at least one, as in {listen: '*:15006', direction: inbound}")
    return tuple(
        _listener(ConfigSection(tree, f"{section.place}listeners[{index}]", section.problems), defaults)
        for index, tree in enumerate(trees)
    )


def _listener(section: ConfigSection, defaults: _Defaults) -> ListenerSettings:
    for key in ("listen", "direction"):
        if key not in section:
            section.complain(key, "is missing")
    listen = section.take("listen", read_listen, _PLACEHOLDER)
    role = Role(section.take("direction", read.one_of(*DIRECTIONS), Role.INBOUND))
    upstream = read_upstream(section)
    default_source = Source.PASSTHROUGH if role is Role.INBOUND else Source.KERNEL
    trusted_ips = section.take("trusted_ips", read.trusted, defaults.trusted_ips)
    of_services = upstream if isinstance(upstream, ServicePorts) else OriginalDestination()
    settings = ListenerSettings(
        name=section.take("name", read.name, f"{role}-{_suffix(listen)}"),
        role=role,
        listen=listen,
        upstream=upstream,
        source=Source(section.take("source", read.one_of(*Source), default_source)),
        access=read.access(section),
        allow_metadata_addresses=section.take("allow_metadata_addresses", read.flag, False),
        limits=_limits(section, Limits()),
        timeouts=_timeouts(section, defaults.timeouts),
        trusted_ips=trusted_ips,
        send_proxy_protocol=section.take("send_proxy_protocol", read.proxy_protocol_version, None),
        ssl=server_tls(section.section("ssl")) if "ssl" in section else None,
        upstream_tls=client_tls(section.section("upstream_tls")) if "upstream_tls" in section else None,
        services=read_services(section, Surroundings(role, defaults.secrets, trusted_ips, of_services)),
    )
    if role is Role.DNS:
        for key in ("source", "allow_metadata_addresses", "limits", "timeouts", "trusted_ips"):
            if key in section:
                section.complain(key, "has no meaning for DNS; leave it out")
    section.finish(("ssl", "upstream_tls"))
    return settings


def _suffix(listen: Listen) -> str:
    return str(listen.port) if listen.port else str(listen.address).rpartition("/")[2]


def _limits(section: ConfigSection, default: Limits) -> Limits:
    limits = section.section("limits")
    count = read.whole(0, MAX_CONNECTIONS)
    found = Limits(
        limits.take("connections", count, default.connections),
        limits.take("connections_per_source", count, default.connections_per_source),
    )
    limits.finish()
    return found


def _dns(section: ConfigSection) -> DnsSettings:
    default = DnsSettings()
    found = DnsSettings(
        section.take("resolv_conf", read.path, default.resolv_conf),
        section.take("zone_file", read.path, default.zone_file),
        section.take("zone", read.text, default.zone),
    )
    section.finish()
    return found


def _timeouts(section: ConfigSection, default: Timeouts) -> Timeouts:
    timeouts = section.section("timeouts")
    found = Timeouts(
        connect=timeouts.take("connect", read.seconds, default.connect),
        handshake=timeouts.take("handshake", read.seconds, default.handshake),
        idle=timeouts.take("idle", read.seconds, default.idle),
        half_closed=timeouts.take("half_closed", read.seconds, default.half_closed),
    )
    timeouts.finish()
    return found

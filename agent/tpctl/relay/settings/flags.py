"""The relay's settings as flags give them: an inbound, an outbound and a DNS listener. Pure."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any, TypeVar

from tpctl.config.values import BadValueError
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings import section as read
from tpctl.relay.settings.check import contradictions
from tpctl.relay.settings.dns import DnsSettings
from tpctl.relay.settings.listen import Listen, read_address, read_listen
from tpctl.relay.settings.model import (
    DEFAULT_DRAIN_SECONDS,
    MAX_WORKERS,
    Acceleration,
    ListenerSettings,
    Role,
    Settings,
    Source,
    TrustedSources,
)
from tpctl.spec.policy import DEFAULT_DNS_PORT, DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT, MAX_PORT
from tpctl.system.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Flags:
    """What stood on the command line, or its defaults."""

    inbound_port: int = DEFAULT_INBOUND_PORT
    outbound_port: int = DEFAULT_OUTBOUND_PORT
    dns_port: int = DEFAULT_DNS_PORT
    bind_address: str = "::"
    inbound_listen: str | None = None
    outbound_listen: str | None = None
    trusted_ips: Sequence[str] = ()
    send_proxy_protocol: str | None = None
    transparent: bool = False
    allow_metadata_addresses: bool = False
    dns: DnsSettings = field(default_factory=DnsSettings)
    workers: int = 1
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    access_log: bool = False
    metrics: str | None = None
    user: str | None = None
    accelerate: str = Acceleration.OFF

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Flags:
        """From the parameters of the command line, of which some may be missing."""
        default = DnsSettings()
        dns = DnsSettings(
            options.get("resolv_conf", default.resolv_conf),
            options.get("dns_zone_file", default.zone_file),
            options.get("dns_zone", default.zone),
        )
        own = {name: value for name, value in options.items() if name in cls.__dataclass_fields__}
        return cls(**own, dns=dns)

    def settings(self) -> Settings:
        """The settings they stand for. Raises InputError, naming every problem."""
        return _Reading(self).settings()


@dataclass(slots=True)
class _Reading:
    flags: Flags
    problems: list[str] = field(default_factory=list)

    def settings(self) -> Settings:
        flags = self.flags
        self._check_ports()
        self._check_numbers()
        trusted = self._read("--trusted-ips", read.trusted, list(flags.trusted_ips), TrustedSources())
        version = int(flags.send_proxy_protocol[1]) if flags.send_proxy_protocol else None
        inbound = self._listen("--inbound-listen", flags.inbound_listen, flags.inbound_port)
        listeners = (
            ListenerSettings(
                "inbound",
                Role.INBOUND,
                replace(inbound, transparent=True) if flags.transparent else inbound,
                source=Source.CLIENT if flags.transparent else Source.PASSTHROUGH,
                allow_metadata_addresses=flags.allow_metadata_addresses,
                trusted_ips=trusted,
                send_proxy_protocol=version,
            ),
            ListenerSettings(
                "outbound",
                Role.OUTBOUND,
                self._listen("--outbound-listen", flags.outbound_listen, flags.outbound_port),
                allow_metadata_addresses=flags.allow_metadata_addresses,
                trusted_ips=trusted,
            ),
            ListenerSettings("dns", Role.DNS, self._listen("--dns-port", None, flags.dns_port)),
        )
        metrics = self._read("--metrics", read_address, flags.metrics, None) if flags.metrics else None
        settings = Settings(
            listeners=listeners,
            dns=flags.dns,
            workers=flags.workers,
            drain_seconds=flags.drain_seconds,
            access_log=flags.access_log,
            metrics=metrics,
            user=flags.user,
            accelerate=Acceleration(flags.accelerate),
        )
        if not self.problems:
            self.problems += contradictions(settings)
        if self.problems:
            raise InputError(self.problems)
        return settings

    def _check_ports(self) -> None:
        flags = self.flags
        ports = {"dns": flags.dns_port}
        if flags.inbound_listen is None:
            ports["inbound"] = flags.inbound_port
        if flags.outbound_listen is None:
            ports["outbound"] = flags.outbound_port
        names: dict[int, list[str]] = {}
        for name in ("inbound", "outbound", "dns"):
            if name in ports:
                names.setdefault(ports[name], []).append(f"--{name}-port")
                if not 1 <= ports[name] <= MAX_PORT:
                    self.problems.append(f"--{name}-port: {ports[name]} is not within 1-{MAX_PORT}")
        self.problems += [
            f"{' and '.join(same)} are both {port}; each listener needs a port of its own"
            for port, same in names.items()
            if len(same) > 1
        ]

    def _check_numbers(self) -> None:
        flags = self.flags
        if not 1 <= flags.workers <= MAX_WORKERS:
            self.problems.append(f"--workers: {flags.workers} is not within 1-{MAX_WORKERS}")
        if not 0 <= flags.drain_seconds < float("inf"):
            self.problems.append(f"--drain-timeout: {flags.drain_seconds:g} is not a number of seconds")
        try:
            ip_address(flags.bind_address)
        except ValueError:
            self.problems.append(f"--bind-address: {flags.bind_address!r} is not an IP address")

    def _listen(self, flag: str, text: str | None, port: int) -> Listen:
        """As given, or the port on --bind-address, for both families if that is the IPv6 wildcard."""
        anywhere = Listen(Destination("0.0.0.0", port))
        if text is not None:
            return self._read(flag, read_listen, text, anywhere)
        try:
            address = ip_address(self.flags.bind_address)
        except ValueError:
            return anywhere
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        return Listen(Destination(str(address), port, family), reuseport=self.flags.workers > 1, ipv6only=False)

    def _read(self, flag: str, reader: Callable[[object], T], raw: object, default: T) -> T:
        try:
            return reader(raw)
        except BadValueError as bad:
            self.problems += [f"{flag}: {problem}" for problem in bad.problems]
            return default

"""Whether the installed policy brings a file's services any connections. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from tpctl.relay.settings.model import ListenerSettings, Role, Service, ServiceProtocol, Settings
from tpctl.spec.connection import Connection, Direction
from tpctl.spec.decide import decide
from tpctl.spec.policy import Address, DnsCapture, Policy
from tpctl.spec.verdict import Action, Verdict

_ANY_INTERFACE = "any"
_HERE = (ip_address("192.0.2.1"), ip_address("2001:db8::1"))
_AFAR = (ip_address("198.51.100.1"), ip_address("2001:db8:1::1"))
"""Addresses of the documentation: no policy names them (RFC 5737, RFC 3849)."""


@dataclass(frozen=True, slots=True)
class Misfits:
    """What does not fit together."""

    problems: tuple[str, ...] = ()
    """Clients would reach an application without what the file asks of them."""
    warnings: tuple[str, ...] = ()
    """Services that nobody reaches."""


def misfits(settings: Settings, policy: Policy) -> Misfits:
    """A line for each, beginning with the listener."""
    problems: list[str] = []
    warnings: list[str] = []
    for listener in settings.listeners:
        place = f"listener {listener.name}"
        if not _is_redirected_to(listener, policy):
            warnings.append(f"{place}: listen: the installed policy does not redirect to port {listener.listen.port}")
            continue
        for service in listener.services:
            for line in _passed_by(listener, service, policy):
                where = f"{place}: service {service.name}: {line}"
                (warnings if service.protocol is ServiceProtocol.TCP else problems).append(where)
    return Misfits(tuple(problems), tuple(warnings))


def _is_redirected_to(listener: ListenerSettings, policy: Policy) -> bool:
    if listener.role is Role.DNS:
        return policy.dns.capture is not DnsCapture.OFF and policy.dns.port == listener.listen.port
    side = policy.inbound if listener.role is Role.INBOUND else policy.outbound
    return side.enabled and side.port == listener.listen.port


def _passed_by(listener: ListenerSettings, service: Service, policy: Policy) -> Iterator[str]:
    verdicts = [
        decide(policy, connection)
        for connection in _connections(listener, service, policy)
        if connection.family in policy.families
    ]
    if verdicts and all(verdict.action is not Action.REDIRECT for verdict in verdicts):
        yield (
            f"port: the installed policy does not redirect connections to port {service.port}: {_why(verdicts[0])}, "
            "so they do not come here"
        )


def _why(verdict: Verdict) -> str:
    return f"{verdict.reason} ({verdict.rule})"


def _connections(listener: ListenerSettings, service: Service, policy: Policy) -> Iterator[Connection]:
    if listener.role is Role.INBOUND:
        for source, destination in zip(_AFAR, _HERE, strict=True):
            yield Connection(Direction.INBOUND, "tcp", source, destination, service.port, _ANY_INTERFACE)
        return
    uid = policy.proxy_uid + 1
    for address in _destinations(service):
        source = _HERE[0] if address.version == 4 else _HERE[1]
        yield Connection(Direction.OUTBOUND, "tcp", source, address, service.port, _ANY_INTERFACE, uid=uid)


def _destinations(service: Service) -> Iterator[Address]:
    if not service.to:
        yield from _AFAR
    for network in service.to.networks:
        yield network.network_address

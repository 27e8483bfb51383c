"""How commands print: results to stdout, for people or as JSON; notices to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import click

from tpctl.spec.policy import BoundSockets, DnsCapture, Policy, WhenProxyDown, is_scoped
from tpctl.system.text import without_surrogates

_PREFIXES = ("warning: ", "note: ")


def notices(lines: Iterable[str]) -> None:
    """Print notices to stderr, one a line; those without "warning: " or "note: " get the latter."""
    for line in lines:
        text = line if line.startswith(_PREFIXES) else f"note: {line}"
        click.secho(text, err=True, fg="yellow" if text.startswith("warning: ") else None)


API_VERSION = "tpctl/v1"
"""Of everything that is printed as JSON; docs/schemas/output.json describes it."""


def document(kind: str, data: Mapping[str, object]) -> dict[str, object]:
    """What a command tells, with the names by which a reader knows it."""
    return {"apiVersion": API_VERSION, "kind": kind, **data}


def as_json(kind: str, data: Mapping[str, object]) -> None:
    """Print a document to stdout; what JSON does not know (addresses, ports) becomes its text.

    Bytes of somebody else's name that are no UTF-8 are written out: many readers of JSON refuse lone surrogates
    (RFC 8259, section 8.2).
    """
    import json  # lazily: most runs print for people

    click.echo(json.dumps(_unicode(document(kind, data)), indent=2, default=str))


def _unicode(value: object) -> object:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, Mapping):
        return {_unicode(key): _unicode(one) for key, one in value.items()}
    return [_unicode(one) for one in value] if isinstance(value, list | tuple) else value


def camel(record: Mapping[str, object]) -> dict[str, object]:
    """A record of Python names with the names it has in JSON: `source_port` becomes `sourcePort`."""
    words = ((name.split("_"), value) for name, value in record.items())
    return {first + "".join(map(str.capitalize, rest)): value for (first, *rest), value in words}


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"  {name:<{width}}  {value}")


def columns() -> int | None:
    """How many columns the terminal has that stdout is; None where it is none, and lines may be as long as they are."""
    import shutil  # lazily: only tables need it

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def family_names(families: Iterable[int]) -> str:
    """ "IPv4 and IPv6", in words."""
    return " and ".join(f"IPv{int(family)}" for family in sorted(families)) or "no IP family"


@dataclass(frozen=True, slots=True)
class UserNames:
    """Users as people know them."""

    known: Mapping[int, str] = field(default_factory=dict)

    def of(self, uid: int) -> str:
        """ "uid 5678 (kuma-dp)", or the uid alone."""
        return f"uid {self.number(uid)}"

    def number(self, uid: int) -> str:
        """The same without the word "uid"."""
        return f"{uid} ({self.known[uid]})" if uid in self.known else str(uid)


NOBODY_KNOWN = UserNames()


def describe(policy: Policy, names: UserNames = NOBODY_KNOWN) -> list[tuple[str, str]]:
    """What a policy does, in a few rows for people."""
    inbound, outbound = policy.inbound, policy.outbound
    rows = [
        ("data plane user", names.number(policy.proxy_uid)),
        ("inbound TCP", _direction(inbound.enabled, inbound.port, inbound.include_ports, inbound.exclude_ports)),
        ("outbound TCP", _direction(outbound.enabled, outbound.port, outbound.include_ports, outbound.exclude_ports)),
        ("DNS", _dns(policy)),
        ("only connections of", f"the control group {policy.cgroup}" if policy.cgroup else ""),
        ("data plane down", "connections go directly" if policy.when_proxy_down is WhenProxyDown.BYPASS else ""),
        ("not from", _list(inbound.exclude_sources)),
        ("not to", _list(outbound.exclude_destinations)),
        ("not by users", "  ".join(map(str, outbound.exclude_uids))),
        ("not with marks", _list(outbound.exclude_marks)),
        ("not by interfaces", _list(policy.exclude_interfaces)),
        ("bound sockets", "left alone (SO_BINDTODEVICE)" if policy.bound_sockets is BoundSockets.PASS else ""),
        ("virtual networks", "  ".join(map(str, policy.virtual_networks))),
        ("invalid packets", "dropped" if policy.drop_invalid else ""),
        ("own ports", "" if policy.guard_ports else "not guarded"),
        ("kernel log", f"level {policy.log_level}" if policy.log_level is not None else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _direction(enabled: bool, port: int, include: Iterable[object], exclude: Iterable[object]) -> str:
    if not enabled:
        return "not redirected"
    if include:
        return f"to port {port}, only ports {_list(include)}"
    return f"to port {port}" + (f", except ports {_list(exclude)}" if exclude else "")


def _dns(policy: Policy) -> str:
    dns = policy.dns
    if dns.capture is DnsCapture.OFF:
        return "not redirected"
    captured = [server for server in dns.servers if not is_scoped(server.address)]
    whose = "all servers" if dns.capture is DnsCapture.ALL else _list(captured) if captured else "no server"
    passing = [server for server in dns.servers if is_scoped(server.address)]
    also = f"; those to {_list(passing)} pass (s1)" if passing else ""
    return f"to port {dns.port}, queries to {whose}, over {'UDP and TCP' if dns.tcp else 'UDP'}{also}"

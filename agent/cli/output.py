"""How commands print: results to stdout, for people or as JSON; notices to stderr."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from agent.policy import DnsCapture, Policy, WhenProxyDown

_PREFIXES = ("warning: ", "note: ")


def notices(lines: Iterable[str]) -> None:
    """Print notices to stderr, one a line; those without "warning: " or "note: " get the latter."""
    for line in lines:
        text = line if line.startswith(_PREFIXES) else f"note: {line}"
        click.secho(text, err=True, fg="yellow" if text.startswith("warning: ") else None)


def as_json(data: object) -> None:
    """Print data as JSON to stdout; what JSON does not know (addresses, ports) becomes its text."""
    import json  # lazily: most runs print for people

    click.echo(json.dumps(data, indent=2, default=str))


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"  {name:<{width}}  {value}")


def family_names(families: Iterable[int]) -> str:
    """ "IPv4 and IPv6", in words."""
    return " and ".join(f"IPv{int(family)}" for family in sorted(families)) or "no IP family"


def describe(policy: Policy) -> list[tuple[str, str]]:
    """What a policy does, in a few rows for people."""
    inbound, outbound = policy.inbound, policy.outbound
    rows = [
        ("data plane user", str(policy.proxy_uid)),
        ("inbound TCP", _direction(inbound.enabled, inbound.port, inbound.include_ports, inbound.exclude_ports)),
        ("outbound TCP", _direction(outbound.enabled, outbound.port, outbound.include_ports, outbound.exclude_ports)),
        ("DNS", _dns(policy)),
        ("only what is opened by", f"the control group {policy.cgroup}" if policy.cgroup else ""),
        ("data plane away", "connections go straight" if policy.when_proxy_down is WhenProxyDown.BYPASS else ""),
        ("not from", _list(inbound.exclude_sources)),
        ("not to", _list(outbound.exclude_destinations)),
        ("not by users", "  ".join(map(str, outbound.exclude_uids))),
        ("virtual networks", "  ".join(map(str, policy.virtual_networks))),
        ("invalid packets", "dropped" if policy.drop_invalid else ""),
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
    whose = "all servers" if dns.capture is DnsCapture.ALL else _list(dns.servers)
    return f"to port {dns.port}, queries to {whose}, over {'UDP and TCP' if dns.tcp else 'UDP'}"

"""`tpctl status`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from agent.status import Report

NOT_AS_IT_SHOULD_BE = 3

EXAMPLE = """\b
Examples:
  tpctl status
  tpctl status --json | jq .problems

\b
Exit codes: 0 all is well (or nothing is installed), 3 something is not as it should be.
"""


@click.command("status", epilog=EXAMPLE)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
@click.option("--verbose", is_flag=True, help="Show the counters of every rule, also those that never matched.")
def command(as_json: bool, verbose: bool) -> int:
    """Show what is installed, whether the kernel still holds exactly that, and whether the data plane listens.

    Drift is shown as a diff from the plan (-) to the kernel (+).
    """
    from agent import status
    from agent.host.privilege import require_root

    require_root("tpctl status")
    report = status.report()
    click.echo(json.dumps(_document(report), indent=2) if as_json else _text(report, verbose))
    return NOT_AS_IT_SHOULD_BE if report.problems else 0


def _document(report: Report) -> dict[str, Any]:
    from agent.policy_document import to_document

    record, found = report.record, report.inspection
    return {
        "installed": found.installed,
        "engine": found.engine if found.installed else None,
        "variant": found.variant,
        "families": list(found.families),
        "since": record.installed_at if record else None,
        "version": record.version if record else None,
        "phase": record.phase if record else None,
        "policy": to_document(record.policy) if record else None,
        "drift": list(found.drift),
        "ports": [
            {"role": p.role, "protocol": str(p.protocol), "port": p.port, "uids": list(p.uids), "problem": p.problem}
            for p in report.ports
        ],
        "counters": [
            {
                "family": c.family,
                "table": c.table,
                "chain": c.chain,
                "rule": c.rule,
                "packets": c.packets,
                "bytes": c.bytes,
            }
            for c in found.counters
        ],
        "problems": list(report.problems),
    }


def _text(report: Report, verbose: bool) -> str:
    record, found = report.record, report.inspection
    lines = []
    if found.installed:
        families = " and ".join(f"IPv{family}" for family in found.families)
        lines.append(f"installed   {found.engine} engine, {found.variant} variant, {families}")
    else:
        lines.append("installed   nothing")
    if record:
        lines += [f"since       {record.installed_at} by tpctl {record.version}", *_policy_lines(report)]
    for port in report.ports:
        owner = f"uid {', '.join(map(str, port.uids))}" if port.uids else "nobody"
        lines.append(f"{port.role + ' port':<12}{port.port}/{port.protocol}: {owner} listens")
    if found.installed:
        lines.append(f"drift       {'none' if not found.drift else ''}".rstrip())
        lines += [f"  {line}" for line in found.drift]
        lines += _counter_lines(report, verbose)
    lines += [f"problem: {problem}" for problem in report.problems]
    return "\n".join(lines)


def _policy_lines(report: Report) -> list[str]:
    assert report.record is not None
    policy = report.record.policy
    inbound, outbound, dns = policy.inbound, policy.outbound, policy.dns
    sides = [
        (
            "inbound",
            inbound.enabled,
            inbound.port,
            inbound.include_ports,
            inbound.exclude_ports,
            inbound.exclude_sources,
        ),
        (
            "outbound",
            outbound.enabled,
            outbound.port,
            outbound.include_ports,
            outbound.exclude_ports,
            (*outbound.exclude_destinations, *outbound.exclude_uids),
        ),
    ]
    lines = [f"data plane  uid {policy.proxy_uid}"]
    for name, enabled, port, include, exclude, other in sides:
        text = f"to {port}" if enabled else "not redirected"
        if include:
            text += f", only ports {', '.join(map(str, include))}"
        elif exclude or other:
            text += f", except {', '.join(map(str, (*exclude, *other)))}"
        lines.append(f"{name:<12}{text}")
    servers = f" ({', '.join(map(str, dns.servers))})" if dns.servers else ""
    lines.append(f"{'dns':<12}{'not redirected' if dns.capture == 'off' else f'{dns.capture}{servers} to {dns.port}'}")
    lines += [f"{'vnet':<12}{vnet}" for vnet in policy.virtual_networks]
    return lines


def _counter_lines(report: Report, verbose: bool) -> list[str]:
    shown = [counter for counter in report.inspection.counters if verbose or counter.packets]
    if not shown:
        return ["counters    no rule has matched yet"]
    lines = ["counters    packets     bytes  rule"]
    for counter in shown:
        where = f"IPv{counter.family} {counter.table} {counter.chain}"
        lines.append(f"  {counter.packets:>17} {counter.bytes:>9}  {where}: {counter.rule}")
    return lines

"""`tpctl status`."""

from __future__ import annotations

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
    from agent.cli import output
    from agent.host.privilege import require_root

    require_root("tpctl status")
    report = status.report()
    if as_json:
        output.as_json(_document(report))
    else:
        _print(report, verbose)
    return NOT_AS_IT_SHOULD_BE if report.problems else 0


def _document(report: Report) -> dict[str, Any]:
    from agent.cli import confirming
    from agent.policy_document import to_document

    record, found = report.record, report.inspection
    return {
        "installed": found.installed,
        "engine": found.engine if found.installed else None,
        "variant": found.variant,
        "families": list(found.families),
        "since": record.installed_at if record else None,
        "version": record.version if record else None,
        "rulesVersion": found.version,
        "phase": record.phase if record else None,
        "policy": to_document(record.policy) if record else None,
        "draining": report.draining,
        "pending": confirming.data(report.pending),
        "nextBoot": None if report.next_boot is None else list(report.next_boot),
        "drift": list(found.drift),
        "ports": [
            {"role": p.role, "protocol": str(p.protocol), "port": p.port, "uids": list(p.uids), "problem": p.problem}
            for p in report.ports
        ],
        "figures": [{"name": figure.name, "value": figure.value, "most": figure.most} for figure in found.figures],
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


def _print(report: Report, verbose: bool) -> None:
    from agent.cli import output

    record, found = report.record, report.inspection
    what = "nothing"
    if found.installed:
        what = (
            f"{output.family_names(found.families)} by {found.engine}{f' ({found.variant})' if found.variant else ''}"
        )
    click.echo(f"installed: {what}")
    rows = []
    if report.pending:
        left = max(report.pending.remaining, 0)
        awaited = f"the {report.pending.command} is taken back in {left:.0f} s, unless `tpctl confirm` comes before"
        rows.append(("unconfirmed", awaited))
    if report.draining:
        rows.append(("draining", f"{report.draining} connections through the data plane may finish"))
    if record:
        rows += [("since", f"{record.installed_at}, by tpctl {record.version}"), *output.describe(record.policy)]
    for port in report.ports:
        owner = f"uid {', '.join(map(str, port.uids))} listens" if port.uids else "nobody listens"
        rows.append((f"{port.role} listener", f"{port.protocol} {port.port}: {owner}"))
    if report.next_boot is not None and (found.installed or report.next_boot):
        lines = report.next_boot or ("the redirection is not installed again; `tpctl persist` changes that",)
        rows += [("next boot", line) for line in lines]
    for figure in found.figures:
        rows.append((figure.name, f"{figure.value}{f' of at most {figure.most}' if figure.most else ''}"))
    if found.installed:
        rows.append(("drift", "yes, from the plan (-) to the kernel (+):" if found.drift else "none"))
    output.pairs(rows)
    for line in (*(f"    {line}" for line in found.drift), *_counter_lines(report, verbose)):
        click.echo(line)
    for problem in report.problems:
        click.secho(f"problem: {problem}", fg="yellow")


def _counter_lines(report: Report, verbose: bool) -> list[str]:
    shown = [counter for counter in report.inspection.counters if verbose or counter.packets]
    if not report.inspection.installed:
        return []
    if not shown:
        return ["  no rule has matched yet"]
    lines = [f"  {'packets':>15} {'bytes':>9}  rule"]
    for counter in shown:
        where = " ".join((*([f"IPv{counter.family}"] if counter.family else []), counter.table, counter.chain))
        lines.append(f"  {counter.packets:>15} {counter.bytes:>9}  {where}: {counter.rule}")
    return lines

"""`tpctl status`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpctl.system.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tpctl.arrival.check import Report as Arrival
    from tpctl.change.status import Report
    from tpctl.cli.printing.output import UserNames
    from tpctl.envoy.process.standing import Found

NOT_AS_IT_SHOULD_BE = 3
NAMES_SECONDS = 2.0
"""How long the names of users are waited for; without them, their numbers do."""
_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))

EXAMPLE = """\b
Examples:
  tpctl status
  tpctl status --json | jq .problems
  tpctl status --prometheus --probe > /var/lib/prometheus/node-exporter/tpctl.prom

\b
Exit codes: 0 all is well (or nothing is installed), 3 something is not as it should be.
"""


@click.command("status", epilog=EXAMPLE)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
@click.option(
    "--prometheus", "as_metrics", is_flag=True, help="Report as metrics, for node_exporter's textfile collector."
)
@click.option("--probe", is_flag=True, help="Send real connections as well, as `tpctl check` does.")
@click.option(
    "--verbose",
    is_flag=True,
    help="Show the counters of every rule, including those that never matched, and what writes legacy rules.",
)
@click.option(
    "--envoy-folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIRECTORY",
    help="Where a `tpctl envoy run --folder DIRECTORY` keeps its files. [default: /run/tpctl-envoy]",
)
def command(as_json: bool, as_metrics: bool, probe: bool, verbose: bool, envoy_folder: Path | None) -> int:
    """Show what is installed, whether the kernel still holds exactly that, and whether the data plane listens.

    Of an Envoy that `tpctl envoy run` has started, show whether it serves what its file says.
    Drift is shown as a diff from the plan (-) to the kernel (+).
    """
    from tpctl.change import status
    from tpctl.cli.options import probing
    from tpctl.cli.printing import envoy_standing, output
    from tpctl.engines import presence
    from tpctl.host.privilege import require_root

    if as_json and as_metrics:
        raise InputError("--json and --prometheus: use only one of them")
    require_root("tpctl status")
    listings = None
    if presence.others():
        from tpctl.engines.listings import Listings

        listings = Listings()
    report = status.report(listings, verbose=verbose)
    found = report.inspection
    if listings is not None and report.record and found.installed and not listings.are_ours(found.variant):
        from tpctl.arrival import notices
        from tpctl.engines.foreign_tables import foreign_tables

        asked = (report.record.policy, report.record.options.engine, foreign_tables(listings))
        report = report._replace(
            problems=(*report.problems, *notices.problems(*asked)),
            # Also at install, but the first ban often makes its rule later.
            warnings=(*report.warnings, *notices.bypasses(*asked)),
        )
    envoy = _envoy(envoy_folder)
    if envoy:
        report = report._replace(problems=(*report.problems, *envoy.problems))
    arrival = probing.probed() if probe else None
    if as_json:
        probed = {"arrival": probing.data(arrival)} if probe else {}
        output.as_json("Status", {**_document(report), "envoy": envoy_standing.data(envoy), **probed})
    elif as_metrics:
        from tpctl.cli.printing import textfile

        click.echo(textfile.render(report, arrival, time.time()), nl=False)
    else:
        _print(report, verbose, arrival, envoy)
        if arrival:
            output.pairs(probing.rows(arrival))
    bad = report.problems or (arrival and (arrival.astray or arrival.refused))
    return NOT_AS_IT_SHOULD_BE if bad else 0


def _envoy(folder: Path | None) -> Found | None:
    from tpctl.envoy.documents import Places

    place = folder or Places().folder
    if not place.exists():  # most hosts have none, and no need of what it takes to ask one
        return None
    from tpctl.envoy.process import standing

    return standing.look(place)


def _document(report: Report) -> dict[str, Any]:
    from tpctl.cli.options import confirming
    from tpctl.spec.document import to_document

    record, found = report.record, report.inspection
    return {
        "installed": found.installed,
        "engine": found.engine if found.installed else None,
        "variant": found.variant,
        "way": found.way,
        "families": list(found.families),
        "since": record.installed_at if record else None,
        "version": record.version if record else None,
        "rulesVersion": found.version,
        "phase": record.phase if record else None,
        "policy": to_document(record.policy) if record else None,
        "draining": report.draining,
        "pending": confirming.data(report.pending),
        "takenBack": report.taken_back and report.taken_back._asdict(),
        "nextBoot": None if report.next_boot is None else list(report.next_boot),
        "drift": list(found.drift),
        "ports": [
            {
                "role": p.role,
                "protocol": str(p.protocol),
                "port": p.port,
                "uids": list(p.uids),
                "boundTo": list(p.addresses),
                "problem": p.problem,
            }
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
        "warnings": list(report.warnings),
    }


def _print(report: Report, verbose: bool, arrival: Arrival | None, envoy: Found | None) -> None:
    from tpctl.cli.printing import envoy_standing, output

    found = report.inspection
    click.echo(_verdict(report, arrival))
    rows = [*_changes(report), *_installed(report), *(envoy_standing.rows(envoy) if envoy else ())]
    if found.installed:
        rows.append(("drift", "yes, from the plan (-) to the kernel (+):" if found.drift else "none"))
    output.pairs(rows)
    for line in (*(f"    {line}" for line in found.drift), *_counter_lines(report, verbose)):
        click.echo(line)
    for problem in report.problems:
        click.secho(f"problem: {problem}", fg="yellow")
    for warning in report.warnings:
        click.secho(f"warning: {warning}", fg="yellow")


def _verdict(report: Report, arrival: Arrival | None) -> str:
    """What is installed, and whether all is well, on one line."""
    from tpctl.cli.printing import output

    found = report.inspection
    lost = len(arrival.astray) + len(arrival.refused) if arrival else 0
    count = len(report.problems) + lost
    state = ""
    if count:
        state = click.style(f"{count} problem{'s' if count > 1 else ''}, see below", fg="red")
    elif report.pending:
        state = click.style("not confirmed yet", fg="yellow")
    elif found.installed:
        state = click.style("all is well", fg="green")
    what = "nothing"
    if found.installed:
        variant = f" ({found.variant})" if found.variant else ""
        what = f"{output.family_names(found.families)} by {found.engine}{variant}"
    return f"installed: {what}{'; ' if state else ''}{state}"


def _changes(report: Report) -> Iterator[tuple[str, str]]:
    """What is under way, and what has become of the last change."""
    if report.pending:
        left = max(report.pending.remaining, 0)
        yield (
            "unconfirmed",
            f"the {report.pending.command} is taken back in {left:.0f} s, unless `tpctl confirm` comes before",
        )
    if trace := report.taken_back:
        yield (
            "taken back",
            f"the {trace.command}, {_moment(trace.at)}: nobody had confirmed it; installed after that: {trace.now}",
        )
    if report.draining:
        yield "draining", f"{report.draining} connections through the data plane may finish"


def _installed(report: Report) -> Iterator[tuple[str, str]]:
    """The policy, and what there is to say of it on this host."""
    from tpctl.cli.printing import output

    record, found = report.record, report.inspection
    names = user_names(report)
    if record:
        yield "since", f"{_moment(record.installed_at)}, by tpctl {record.version}"
        yield from output.describe(record.policy, names)
    for port in report.ports:
        owner = "nobody listens"
        if port.uids:
            owner = f"{', '.join(map(names.of, port.uids))} listens on {', '.join(port.addresses)}"
        yield f"{port.role} listener", f"{port.protocol} {port.port}: {owner}"
    if report.next_boot is not None and (found.installed or report.next_boot):
        lines = report.next_boot or ("the redirection is not installed again; `tpctl persist` changes that",)
        yield from (("next boot", line) for line in lines)
    for figure in found.figures:
        yield figure.name, f"{figure.value}{f' of at most {figure.most}' if figure.most else ''}"
    if found.way:
        yield "written by", found.way


def user_names(report: Report) -> UserNames:
    """The names of all users that a report speaks of."""
    from tpctl.cli.printing.output import UserNames
    from tpctl.host import users

    uids = {uid for port in report.ports for uid in port.uids}
    if report.record:
        uids.add(report.record.policy.proxy_uid)
    return UserNames(users.names_of(uids, seconds=NAMES_SECONDS))


def _moment(at: str) -> str:
    """A moment of the record, as people say it: "3 minutes ago (2026-12-01T00:25:10+00:00)"."""
    import datetime

    try:
        then = datetime.datetime.fromisoformat(at)
        seconds = (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    except (ValueError, TypeError):  # what a record says is not ours to rely on
        return at
    return f"{ago(seconds)} ({at})"


def ago(seconds: float) -> str:
    """A time in the past in words, by its largest unit.

    >>> ago(3), ago(61), ago(7200), ago(-5), ago(400 * 86400)
    ('3 seconds ago', '1 minute ago', '2 hours ago', 'just now', '400 days ago')
    """
    if seconds < 1:
        return "just now"
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size)
    count = int(seconds // size)
    return f"{count} {unit}{'s' if count > 1 else ''} ago"


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

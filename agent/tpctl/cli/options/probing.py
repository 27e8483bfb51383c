"""The options about live probes, and how commands speak of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from tpctl.system.errors import ApplyError, InputError

if TYPE_CHECKING:
    from tpctl.arrival.check import Report
    from tpctl.arrival.model import Result
    from tpctl.change.confirm import Pending
    from tpctl.change.lifecycle import InstallReport

F = TypeVar("F", bound=Callable[..., Any])
HOLD_SECONDS = 60.0
"""How long a change that requires arrival waits for its probes, before its guardian takes it back."""
VARIABLE = "TPCTL_PROBE"
"""The same as --probe or --no-probe, for whoever installs very often."""


def probe_options(function: F) -> F:
    """Give a command --no-probe and --require-arrival; it is called with `probe` and `require_arrival`, see `After`."""
    required = click.option(
        "--require-arrival",
        is_flag=True,
        help="Take the change back, with exit code 1, if a probe is lost or goes past the data plane.",
    )
    probe = click.option(
        "--probe/--no-probe",
        default=True,
        envvar=VARIABLE,
        help="Send real connections at the end, to see whether they arrive (see `tpctl check`). On by default.",
    )
    return probe(required(function))


class After(TypedDict):
    """What is to happen after a change."""

    confirm_within: float | None
    probe: bool
    require_arrival: bool


def hold(after: After) -> float | None:
    """The seconds after which a change is to be taken back by itself, also when this command is killed.

    Raises InputError when arrival is required and nothing is probed.
    """
    from tpctl.change import confirm

    within = after["confirm_within"]
    if after["require_arrival"] and not after["probe"]:
        raise InputError("--require-arrival and --no-probe exclude each other: only probes can tell")
    if within is not None or not after["require_arrival"] or confirm.load():
        return within
    return HOLD_SECONDS


def settle(installed: InstallReport, after: After) -> tuple[InstallReport, Report | None]:
    """Send the probes of what was just installed; hands back the report as it is then, and theirs.

    Where arrival is required, the change is taken back unless they arrive, and ApplyError raised; and if it was only
    held for the probes, it is kept.
    """
    found = probed() if after["probe"] else None
    if found is None or not after["require_arrival"]:
        return installed, found
    pending = installed.pending
    if found.astray:
        raise ApplyError(f"{_failure(found)}\n{_taken_back(pending)}")
    if pending and after["confirm_within"] is None:
        from tpctl.change import rollback

        rollback.keep()
        installed = installed._replace(pending=None)
    return installed, found


def _taken_back(pending: Pending | None) -> str:
    from tpctl.change import rollback

    outcome = rollback.take_back(pending.token) if pending else None
    if outcome is None:
        return "arrival was required; nothing had been changed, and what was installed before stays"
    return f"arrival was required, so the {outcome.command} was taken back; installed now: {outcome.now}"


def probed() -> Report:
    """The probes of what is installed now."""
    from tpctl.arrival.check import Report, check
    from tpctl.record import state

    record = state.load()
    return check(record) if record else Report()


def warnings(report: Report | None, pending: Pending | None, *, told: bool) -> list[str]:
    """What a command that changes the kernel has to say about its probes.

    `told` is whether it has said already that nobody listens.
    """
    if report is None:
        return []
    shown = report.astray if told else (*report.astray, *report.refused)
    lines = [line for one in shown for line in _lines(one)]
    if pending and report.astray:
        left = max(pending.remaining, 0)
        lines.append(
            f"`tpctl rollback` takes the {pending.command} back now; otherwise that happens by itself in {left:.0f} s"
        )
    elif report.astray:
        lines.append("`tpctl check` sends the probes again; `tpctl uninstall` takes the redirection away")
    unsent = report.skipped if not report.results else ()
    return [*(f"warning: {line}" for line in lines), *(f"note: no probe could be sent: {why}" for why in unsent)]


def _failure(report: Report) -> str:
    """The probes that did not arrive, as one error of a line each."""
    return "\n".join(line for one in report.astray for line in _lines(one))


def _lines(result: Result) -> list[str]:
    """A probe that did not arrive, and what was found out."""
    outcome, finding = result.outcome, result.finding
    lines = [f"{result.probe.name} is {outcome.fate}: {outcome.detail}"]
    if finding:
        whose = f" (apparently a rule of {finding.whose})" if finding.whose else ""
        lines[0] += f". Where: {finding.where}{whose}"
        if finding.remedy:
            lines.append(f"to let it through: {finding.remedy}")
    return lines


def rows(report: Report) -> list[tuple[str, str]]:
    """Every probe, for people."""
    found = []
    for one in report.results:
        took = f" ({one.outcome.seconds * 1000:.1f} ms)" if one.outcome.fate == "arrived" else ""
        found.append((one.probe.name, f"{one.outcome.fate}{took}: {one.outcome.detail}"))
        if one.finding:
            whose = f" (apparently a rule of {one.finding.whose})" if one.finding.whose else ""
            found.append(("", f"where: {one.finding.where}{whose}"))
            if one.finding.remedy:
                found.append(("", f"to let it through: {one.finding.remedy}"))
    return [*found, *(("not probed", why) for why in report.skipped)]


def data(report: Report | None) -> dict[str, object] | None:
    """The same for JSON."""
    if report is None:
        return None
    return {"probes": [_result(one) for one in report.results], "notProbed": list(report.skipped)}


def _result(result: Result) -> dict[str, object]:
    probe, outcome, finding = result.probe, result.outcome, result.finding
    connection = probe.connection
    return {
        "name": probe.name,
        "kind": str(probe.kind),
        "direction": str(probe.direction),
        "family": int(probe.family),
        "protocol": connection.protocol,
        "source": f"{connection.source}",
        "sourcePort": connection.source_port,
        "destination": f"{connection.destination}",
        "destinationPort": connection.destination_port,
        "uid": connection.uid,
        "expectedPort": probe.expected.port,
        "rule": probe.expected.rule,
        "fate": str(outcome.fate),
        "seconds": round(outcome.seconds, 6),
        "detail": outcome.detail,
        "finding": finding and {"where": finding.where, "whose": finding.whose, "remedy": finding.remedy},
    }

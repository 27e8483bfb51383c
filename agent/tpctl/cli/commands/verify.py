"""`tpctl verify`: rehearse a policy on this kernel, in scratch namespaces."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from tpctl.cli.options.policy_options import PolicyCommand, PolicyInput, load_policy, policy_options
from tpctl.system.errors import HostError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tpctl.rehearsal.rehearse import Rehearsal, Result
    from tpctl.spec.engine_options import EngineOptions
    from tpctl.spec.policy import Address, Policy

WRONG = 3
"""The exit code for "something is not as it should be"."""

EPILOG = """\b
Without policy flags the installed policy is rehearsed; with any of them, the policy they describe.
Prints a summary and the probes that went wrong; exits with 3 if there are any.

\b
Examples:
  tpctl verify
  tpctl verify --kuma-dp-user kuma-dp --exclude-inbound-ports 22
  tpctl verify --kuma-dp-user kuma-dp --exclude-inbound-ports 22 --all
"""
_DONE = {"redirect": "redirected", "pass": "passed", "drop": "dropped", "reset": "refused"}
"""What became of a connection, by the action of its verdict."""
_INDENT = " " * 7


@click.command(cls=PolicyCommand, epilog=EPILOG)
@policy_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--all", "show_all", is_flag=True, help="Print every probe, not only those that went wrong.")
@click.option("--failures", is_flag=True, hidden=True, help="What is printed anyway.")
def command(policy_input: PolicyInput, as_json: bool, show_all: bool, failures: bool) -> int:
    """Rehearse a policy on this kernel: install it in a scratch namespace and open real connections there.

    The scratch host, its peer and its containers vanish afterwards. This host's own rules are neither read nor changed,
    so verify says whether this kernel and these tools carry the policy out, and status whether the host still holds it.
    """
    from tpctl.cli.printing import output
    from tpctl.rehearsal.rehearse import rehearse

    policy, options, which, notices = _subject(policy_input)
    if os.geteuid() != 0:
        raise HostError("tpctl verify makes network namespaces and needs root: run it with sudo")
    rehearsal = rehearse(policy, options)
    notices = (*notices, *rehearsal.notes)
    if as_json:
        output.as_json("Verify", {"policy": which, "notices": notices, **_data(rehearsal)})
    else:
        output.notices(notices)
        _print(rehearsal, which, show_all=show_all)
    return 0 if rehearsal.ok else WRONG


def _subject(policy_input: PolicyInput) -> tuple[Policy, EngineOptions, str, tuple[str, ...]]:
    """The policy, how to carry it out, "given" or "installed", and notices."""
    if policy_input.given:
        resolved = load_policy(policy_input)
        return resolved.policy, resolved.options, "given", resolved.notices
    from tpctl.record import state

    installed = state.load()
    if installed is None:
        raise InputError(
            "nothing is installed in this network namespace; describe a policy with the flags of tpctl install, "
            "as in --kuma-dp-user kuma-dp"
        )
    return installed.policy, installed.options, "installed", ()


def _endpoint(address: Address, port: int | None) -> str:
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _expectation(result: Result) -> str:
    """Who should answer, in a word or two."""
    port = result.verdict.port
    return f"redirect {port}" if port else str(result.verdict.action)


def _got(result: Result) -> str:
    """Who answered, in a word or two."""
    if result.answer.seat is None or result.expected is None:
        return str(result.answer)
    if result.answer.seat != result.expected:
        return f"{result.answer.seat} answered"
    return _expectation(result) if result.original_kept else f"original destination lost ({result.answer.original})"


def _data(rehearsal: Rehearsal) -> dict[str, object]:
    return {
        "ok": rehearsal.ok,
        "engine": rehearsal.engine,
        "variant": rehearsal.variant,
        "probes": [
            {
                "label": result.probe.label,
                "direction": result.probe.connection.direction,
                "protocol": result.probe.connection.protocol,
                "from": str(result.probe.connection.source),
                "to": _endpoint(result.probe.connection.destination, result.probe.connection.destination_port),
                "interface": result.probe.connection.interface,
                "uid": result.probe.connection.uid,
                "cgroup": result.probe.connection.cgroup,
                "expected": _expectation(result),
                "answererExpected": result.expected and str(result.expected),
                "rule": result.verdict.rule,
                "reason": result.verdict.reason,
                "answerer": str(result.answer),
                "ok": result.ok,
            }
            for result in rehearsal.results
        ],
    }


def _print(rehearsal: Rehearsal, which: str, *, show_all: bool) -> None:
    from tpctl.cli.printing import output

    wrong = [result for result in rehearsal.results if not result.ok]
    if shown := rehearsal.results if show_all else wrong:
        _print_probes(shown)
        click.echo()
    output.pairs(_summary(rehearsal.results))
    count = len(rehearsal.results)
    verdict = f"{len(wrong)} of {count} probes ended elsewhere" if wrong else f"all {count} probes ended as they should"
    engine = f"{rehearsal.engine} ({rehearsal.variant})" if rehearsal.variant else rehearsal.engine
    click.secho(f"{verdict}: {which} policy, {engine}", fg="red" if wrong else "green")


def _print_probes(shown: Sequence[Result]) -> None:
    """A table where it fits the terminal, else a few lines for each probe."""
    from tpctl.cli.printing import output

    header = ("probe", "from", "to", "expected", "got", "", "because")
    rows = [header, *(_row(result) for result in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    columns = output.columns()
    if columns is not None and sum(widths) + 2 * (len(widths) - 1) > columns:
        for result in shown:
            _print_stacked(result, columns)
        return
    for row, ok in zip(rows, [None, *(result.ok for result in shown)], strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(line if ok else click.style(line, bold=ok is None, fg="red" if ok is False else None))


def _print_stacked(result: Result, columns: int) -> None:
    label, who, to, expected, got, ok, because = _row(result)
    got = "" if result.ok else f", got {got}"
    for line in (f"{ok:<5}  {label}", f"{_INDENT}{who} to {to}: {expected}{got}", f"{_INDENT}{because}"):
        text = click.wrap_text(line.strip(), columns, line[: len(line) - len(line.lstrip())], _INDENT)
        click.echo(text if result.ok else click.style(text, fg="red"))


def _summary(results: Iterable[Result]) -> list[tuple[str, str]]:
    """What each direction of each family was asked, and how that ended."""
    found: dict[str, list[Result]] = {}
    for result in results:
        connection = result.probe.connection
        found.setdefault(f"IPv{connection.family} {connection.direction}", []).append(result)
    return [(name, _counted(mine)) for name, mine in found.items()]


def _counted(results: Sequence[Result]) -> str:
    ended: dict[str, int] = {}
    for result in results:
        what = _DONE[result.verdict.action] if result.ok else "WRONG"
        ended[what] = ended.get(what, 0) + 1
    return f"{len(results)} probes: {', '.join(f'{count} {what}' for what, count in ended.items())}"


def _row(result: Result) -> tuple[str, ...]:
    connection = result.probe.connection
    who = str(connection.source) if connection.uid is None else f"uid {connection.uid}"
    to = f"{connection.protocol} {_endpoint(connection.destination, connection.destination_port)}"
    because = f"{result.verdict.reason} ({result.verdict.rule})"
    return result.probe.label, who, to, _expectation(result), _got(result), "ok" if result.ok else "WRONG", because

"""`tpctl explain`: what happens to one connection, and why, by the specification. Touches nothing and needs no root."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from tpctl.cli.complete import candidates
from tpctl.cli.options.asked import Asked, Question, connections_of, is_address, joined
from tpctl.cli.options.conventions import Group
from tpctl.cli.options.policy_options import PolicyCommand, PolicyInput, load_policy, policy_options
from tpctl.spec.policy import DNS_PORT, Policy
from tpctl.system.errors import InputError

if TYPE_CHECKING:
    from tpctl.engines.foreign import Table
    from tpctl.spec.connection import Connection
    from tpctl.spec.verdict import Verdict

EPILOG = """\b
Without policy flags, the installed policy is used; with any of them, the policy they describe.

\b
Examples:
  tpctl explain outbound --uid 1000 --to 10.1.2.3:443
  tpctl explain inbound --from 10.0.0.9 --to 10.0.0.5:8080 --exclude-inbound-ports 8080
  tpctl explain outbound --process-cgroup system.slice/app.service --to 10.1.2.3:443
  tpctl explain outbound --mark 0x80000 --to 203.0.113.10:443
  tpctl explain dns --uid app --to 10.0.0.53 --tcp
"""


class ExplainCommand(PolicyCommand):
    """A subcommand of explain."""

    own_section = "Connection"


@click.group(cls=Group, epilog=EPILOG)
def command() -> None:
    """What happens to one connection, and why.

    Prints the verdict and every rule that was asked, in order, with its answer. Sends nothing and changes nothing.
    Where kumactl's rules are installed and tpctl's are not, root is told about those.
    """


def _subcommand(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """The options every question has; the function turns the others into a `Question`."""

    def decorate(function: Callable[..., None]) -> click.Command:
        json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
        made = click.command(name, cls=ExplainCommand, epilog=EPILOG)(json_option(policy_options(function)))
        command.add_command(made)
        return made

    return decorate


_TO = functools.partial(click.option, "--to", required=True)
_UID = click.option(
    "--uid",
    "user",
    metavar="USER",
    shell_complete=candidates.users,
    help="Uid or name of the user that connects. [default: you]",
)
_CGROUP = click.option(
    "--process-cgroup",
    metavar="CGROUP",
    shell_complete=candidates.groups,
    help="Control group of the process that connects. [default: yours]",
)
_BOUND_TO = click.option(
    "--bound-to",
    metavar="NAME",
    shell_complete=candidates.interfaces,
    help="Interface the socket is bound to (SO_BINDTODEVICE). [default: none]",
)
_MARK = click.option("--mark", metavar="MARK", help="Mark of the socket (SO_MARK): 0x80000, 51820. [default: none]")
_INTERFACE = click.option(
    "--interface",
    "--via",
    "interface",
    metavar="NAME",
    shell_complete=candidates.interfaces,
    help="Interface it passes. [default: from this host's routes]",
)
_PROTOCOL = click.option(
    "--protocol", type=click.Choice(["tcp", "udp", "icmp", "sctp"]), default="tcp", show_default=True, help="Protocol."
)
_STATE = click.option(
    "--state",
    type=click.Choice(["new", "midstream", "established", "invalid"]),
    default="new",
    show_default=True,
    help="The packet's conntrack state.",
)


@_subcommand("outbound")
@_TO(metavar="ADDRESS:PORT", help="Where it goes; IPv6 as [fd00::1]:443, or a host's name.")
@click.option("--from", "source", metavar="ADDRESS[:PORT]", help="Its source. [default: from this host's routes]")
@_UID
@_CGROUP
@_BOUND_TO
@_MARK
@_INTERFACE
@_PROTOCOL
@_STATE
def outbound(policy_input: PolicyInput, as_json: bool, **asked: Any) -> None:
    """A connection that a process on this host opens."""
    _answer(policy_input, "outbound", Question(**asked), as_json)


@_subcommand("inbound")
@_TO(metavar="ADDRESS:PORT", help="Where it goes; IPv6 as [fd00::1]:8080.")
@click.option("--from", "source", required=True, metavar="ADDRESS[:PORT]", help="Where it comes from.")
@_INTERFACE
@_PROTOCOL
@_STATE
@click.option(
    "--forwarded/--to-this-host",
    default=None,
    help="Whether the destination is another host's address. [default: from this host's addresses]",
)
def inbound(policy_input: PolicyInput, as_json: bool, **asked: Any) -> None:
    """A connection that arrives on an interface."""
    _answer(policy_input, "inbound", Question(**asked), as_json)


@_subcommand("dns")
@_TO(metavar="SERVER[:PORT]", help="The name server.")
@_UID
@_CGROUP
@_BOUND_TO
@_MARK
@_INTERFACE
@click.option("--tcp", is_flag=True, help="Over TCP instead of UDP.")
def dns(policy_input: PolicyInput, as_json: bool, tcp: bool, **asked: Any) -> None:
    """A DNS query from a process on this host."""
    question = Question(**asked, protocol="tcp" if tcp else "udp", default_port=DNS_PORT)
    _answer(policy_input, "outbound", question, as_json)


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose rules are asked."""

    which: str
    """"given", "installed", or "kumactl", whose rules are then `tables`."""
    policy: Policy
    engine: str = ""
    notices: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found out about one connection."""

    asked: Asked
    verdict: Verdict
    beside: tuple[str, ...] | None
    """What other software's rules do with it; None where only root may read them, or where they are the subject."""


def _answer(policy_input: PolicyInput, direction: str, question: Question, as_json: bool) -> None:
    from tpctl.cli.printing import output
    from tpctl.spec.connection import Direction

    subject = _subject(policy_input)
    answers = [_answered(subject, one) for one in connections_of(question, Direction(direction), subject.policy)]
    is_name = len(answers) > 1 or not is_address(question.to)
    notices = (*subject.notices, *dict.fromkeys(note for _, notes in answers for note in notes))
    if as_json:
        documents = [_data(answer) for answer, _ in answers]
        found: dict[str, object] = {"name": question.to, "answers": documents} if is_name else documents[0]
        output.as_json("Explain", {"policy": subject.which, "notices": notices, **found})
        return
    output.notices(notices)
    if is_name:
        addresses = ", ".join(str(answer.asked.connection.destination) for answer, _ in answers)
        click.echo(f"{question.to} has {'this address' if len(answers) == 1 else 'these addresses'}: {addresses}\n")
    for number, (answer, _) in enumerate(answers):
        if number:
            click.echo()
        _print(subject.which, answer)


def _answered(subject: Subject, asked: Asked) -> tuple[Answer, tuple[str, ...]]:
    """The answer to one question, and notices."""
    from tpctl.spec.decide import decide

    if subject.which == "kumactl":
        from tpctl.arrival import others_nat

        verdict, unsure = others_nat.decided(subject.tables, asked.connection)
        notes = tuple(f"tpctl cannot tell whether this rule matches, and goes on as if not: {rule}" for rule in unsure)
        return Answer(asked, verdict, None), notes
    if subject.which == "installed" and asked.connection.device:
        asked = dataclasses.replace(asked, connection=_seen_from_its_device(asked.connection))
    verdict = decide(subject.policy, asked.connection)
    return Answer(asked, verdict, _beside(subject.policy, asked.connection, verdict, subject.engine)), ()


def _beside(policy: Policy, connection: Connection, verdict: Verdict, engine: str) -> tuple[str, ...] | None:
    if os.geteuid() != 0:
        return None
    from tpctl.arrival import notices

    return notices.on_this_host(policy, connection, verdict, engine)


def _subject(policy_input: PolicyInput) -> Subject:
    """Whose rules the command line asks. Raises InputError when nothing is described and nothing installed."""
    if policy_input.given:
        resolved = load_policy(policy_input)
        engine = resolved.options.engine
        return Subject("given", resolved.policy.through(engine), engine, resolved.notices)
    from tpctl.record import state

    installed, record = state.load_policy(), state.load()
    if installed is not None:
        return Subject("installed", installed, record.options.engine if record else "")
    if (tables := _kumactls()) is not None:
        said = "kumactl's rules are installed here, and tpctl has no policy for them: its tables nat are asked rule by "
        more = "rule; what raw and mangle do (conntrack zones, invalid packets) is not told"
        return Subject("kumactl", Policy(0), notices=(said + more,), tables=tables)
    raise InputError(
        "nothing is installed in this network namespace; describe a policy with the flags of tpctl install, "
        "as in --kuma-dp-user kuma-dp"
    )


def _kumactls() -> tuple[Table, ...] | None:
    """The tables of this host, if kumactl's rules are in them; only root may read them."""
    if os.geteuid() != 0:
        return None
    from tpctl.engines.foreign_tables import foreign_tables, has_kumactl

    tables = foreign_tables()
    return tables if has_kumactl(tables) else None


def _seen_from_its_device(connection: Connection) -> Connection:
    """With what this host's routes say of the interface that the socket is bound to."""
    from tpctl.host import interfaces

    assert connection.device is not None
    leads = interfaces.leads_to_loopback(connection.device, connection.family)
    return dataclasses.replace(connection, device_leads_to_loopback=leads)


def _data(answer: Answer) -> dict[str, object]:
    from tpctl.cli.printing.output import camel

    verdict, connection = answer.verdict, camel(dataclasses.asdict(answer.asked.connection))
    if not answer.asked.has_route:
        connection |= {"interface": None, "source": None}
    return {
        "connection": connection,
        "hasRoute": answer.asked.has_route,
        "action": verdict.action,
        "port": verdict.port,
        "zone": verdict.zone,
        "rule": verdict.rule,
        "reason": verdict.reason,
        "steps": [dataclasses.asdict(step) for step in verdict.steps],
        "onThisHost": answer.beside,
    }


def _print(which: str, answer: Answer) -> None:
    verdict, interface = answer.verdict, answer.asked.connection.interface
    whose = "kumactl's rules" if which == "kumactl" else f"{which} policy"
    click.echo(f"{_described(answer.asked)} ({whose})")
    action = f"{verdict.action} to port {verdict.port}" if verdict.port else str(verdict.action)
    zone = f", in conntrack zone {verdict.zone}" if verdict.zone else ""
    where = ""
    if answer.asked.has_route:
        click.secho(f"verdict: {action}{zone}", bold=True)
    else:
        where = f", if there were a route by {interface}"
        click.secho("verdict: no route", bold=True)
        click.echo(
            f"because: this host has no route to {answer.asked.connection.destination}: connect(2) fails with "
            '"Network is unreachable", and no rule is asked'
        )
        click.echo(f"with a route by {interface}: {action}{zone}")
    click.echo(f"because: {verdict.reason} ({verdict.rule})")
    click.echo(f"\nrules asked, in order, and the answers{where}:")
    width = max(len(step.rule) for step in verdict.steps)
    for step in verdict.steps:
        click.echo(f"  {'yes' if step.applied else 'no':<3}  {step.rule:<{width}}  {step.text}")
    if answer.beside:
        click.echo("\non this host:")
    for line in answer.beside or ():
        click.echo(f"  {line}")


def _described(asked: Asked) -> str:
    """The connection on one line."""
    connection = asked.connection
    owner = f", uid {connection.uid}" if connection.uid is not None else ""
    if connection.cgroup is not None:
        owner += f", cgroup /{connection.cgroup}"
    if connection.mark:
        owner += f", mark {connection.mark:#x}"
    if connection.device is not None:
        owner += f", bound to {connection.device}"
    to = joined(connection.destination, connection.destination_port)
    if not asked.has_route:
        return f"{connection.direction} {connection.protocol} to {to}, no route{owner}"
    source = joined(connection.source, connection.source_port)
    return f"{connection.direction} {connection.protocol} from {source} to {to} via {connection.interface}{owner}"

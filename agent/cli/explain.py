"""`tpctl explain`: what happens to one connection, and why, by the specification. Touches nothing and needs no root."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

import click

from agent.cli.policy_options import PolicyCommand, PolicyInput, load_policy, policy_options
from agent.config_values import is_interface_name, quoted
from agent.errors import InputError
from agent.policy import DNS_PORT, MAX_PORT, MAX_UID, Address, Policy

if TYPE_CHECKING:
    from agent.decide import Connection, Direction, Verdict

FALLBACK_INTERFACE = "eth0"
EPILOG = """\b
Without policy flags the installed policy is asked; with any of them, the policy they describe.

\b
Examples:
  tpctl explain outbound --uid 1000 --to 10.1.2.3:443
  tpctl explain inbound --from 10.0.0.9 --to 10.0.0.5:8080 --exclude-inbound-ports 8080
  tpctl explain outbound --process-cgroup system.slice/app.service --to 10.1.2.3:443
  tpctl explain dns --uid app --to 10.0.0.53 --tcp
"""


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked for, as it was typed."""

    to: str
    source: str | None = None
    user: str | None = None
    process_cgroup: str | None = None
    interface: str | None = None
    protocol: str = "tcp"
    state: str = "new"
    default_port: int | None = None
    forwarded: bool | None = None


class ExplainCommand(PolicyCommand):
    """A subcommand of explain."""

    own_section = "Connection"


@click.group(epilog=EPILOG)
def command() -> None:
    """What happens to one connection, and why.

    Prints the verdict and every rule that was asked, in order. Sends nothing and changes nothing.
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
_UID = click.option("--uid", "user", metavar="USER", help="Uid or name of the user that connects. [default: you]")
_CGROUP = click.option(
    "--process-cgroup", metavar="CGROUP", help="Control group of the process that connects. [default: yours]"
)
_INTERFACE = click.option("--interface", metavar="NAME", help="Interface it passes. [default: by this host's routes]")
_PROTOCOL = click.option(
    "--protocol", type=click.Choice(["tcp", "udp", "icmp", "sctp"]), default="tcp", show_default=True, help="Protocol."
)
_STATE = click.option(
    "--state",
    type=click.Choice(["new", "midstream", "established", "invalid"]),
    default="new",
    show_default=True,
    help="What conntrack knows of the packet.",
)


@_subcommand("outbound")
@_TO(metavar="ADDRESS:PORT", help="Where it goes; IPv6 as [fd00::1]:443.")
@click.option("--from", "source", metavar="ADDRESS[:PORT]", help="Its source. [default: by this host's routes]")
@_UID
@_CGROUP
@_INTERFACE
@_PROTOCOL
@_STATE
def outbound(policy_input: PolicyInput, as_json: bool, **asked: Any) -> None:
    """A connection that a process of this host opens."""
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
    help="Whether the destination is another host's address. [default: by this host's addresses]",
)
def inbound(policy_input: PolicyInput, as_json: bool, **asked: Any) -> None:
    """A connection that arrives on an interface."""
    _answer(policy_input, "inbound", Question(**asked), as_json)


@_subcommand("dns")
@_TO(metavar="SERVER[:PORT]", help="The name server.")
@_UID
@_CGROUP
@click.option("--tcp", is_flag=True, help="Over TCP instead of UDP.")
def dns(policy_input: PolicyInput, as_json: bool, tcp: bool, **asked: Any) -> None:
    """A DNS query of a process of this host."""
    question = Question(**asked, protocol="tcp" if tcp else "udp", default_port=DNS_PORT)
    _answer(policy_input, "outbound", question, as_json)


def _answer(policy_input: PolicyInput, direction: str, question: Question, as_json: bool) -> None:
    from agent.cli import output
    from agent.decide import Direction, decide

    policy, which, notices = _policy(policy_input)
    connection = connection_of(question, Direction(direction), policy)
    verdict = decide(policy, connection)
    if as_json:
        output.as_json({"policy": which, "notices": notices, **_data(connection, verdict)})
    else:
        output.notices(notices)
        _print(which, connection, verdict)


def _policy(policy_input: PolicyInput) -> tuple[Policy, str, tuple[str, ...]]:
    """The policy that is asked, "given" or "installed", and notices."""
    if policy_input.given:
        resolved = load_policy(policy_input)
        return resolved.policy, "given", resolved.notices
    from agent import state

    installed = state.load_policy()
    if installed is None:
        raise InputError(
            "nothing is installed in this network namespace; describe a policy with the flags of tpctl install, "
            "as in --kuma-dp-user kuma-dp"
        )
    return installed, "installed", ()


def connection_of(question: Question, direction: Direction, policy: Policy) -> Connection:
    """The connection a question is about; what it leaves open is filled in as this host would. Raises InputError."""
    from agent.decide import Connection, Direction, State
    from agent.host.facts import LiveHost

    problems: list[str] = []
    to = _endpoint("--to", question.to, problems)
    source = _endpoint("--from", question.source, problems) if question.source else None
    outgoing = direction is Direction.OUTBOUND
    uid = _uid(question.user, problems) if outgoing else None
    cgroup = _cgroup(question.process_cgroup, policy, problems) if outgoing else None
    port = to[1] or question.default_port if to else None
    if to and port is None and question.protocol in ("tcp", "udp"):
        problems.append(f"--to: {quoted(question.to)} has no port; write {_joined(to[0], 443)}")
    if to and source and to[0].version != source[0].version:
        problems.append(f"--from and --to: {source[0]} is IPv{source[0].version} and {to[0]} is IPv{to[0].version}")
    if question.interface is not None and not is_interface_name(question.interface):
        problems.append(f"--interface: {quoted(question.interface)} is not the name of an interface")
    if problems or to is None:
        raise InputError(problems)
    peer = to[0] if outgoing or source is None else source[0]
    interface, own = _path(peer, policy.loopback)
    local = LiveHost().is_local(to[0])
    return Connection(
        direction=direction,
        protocol=question.protocol,
        source=source[0] if source else own,
        source_port=source[1] if source else None,
        destination=to[0],
        destination_port=port,
        interface=question.interface or interface,
        uid=uid,
        cgroup=cgroup,
        local_destination=local if question.forwarded is None else not question.forwarded,
        state=State(question.state),
    )


def _path(peer: Address, loopback: str) -> tuple[str, Address]:
    """The interface between this host and a peer, and this host's address on it."""
    from agent.host import interfaces
    from agent.host.facts import LiveHost

    route = interfaces.route_to(peer)
    source = route.source if route else type(peer)(0)
    if LiveHost().is_local(peer):
        return loopback, source
    if route:
        return route.interface, source
    others = (name for name in interfaces.names() if not interfaces.is_loopback(name))
    return next(others, FALLBACK_INTERFACE), source


def _endpoint(flag: str, text: str, problems: list[str]) -> tuple[Address, int | None] | None:
    """`10.0.0.1:443`, `[fd00::1]:443`, or an address alone."""
    host, port = text.strip(), ""
    if host.startswith("["):
        host, _, port = host[1:].partition("]")
        host, port = (host, port[1:]) if port[:1] in ("", ":") else ("", "")
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    try:
        address = ip_address(host)
    except ValueError:
        problems.append(f"{flag}: {quoted(text)} is no ADDRESS:PORT; write 10.1.2.3:443 or [fd00::1]:443")
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped:  # connections there are of IPv4
        problems.append(f"{flag}: {quoted(text)} is an IPv4 address written as IPv6; write {address.ipv4_mapped}")
        return None
    if not port:
        return address, None
    if not port.isdecimal() or not 1 <= int(port) <= MAX_PORT:
        problems.append(f"{flag}: {quoted(port)} is not a port (1-{MAX_PORT})")
        return None
    return address, int(port)


def _uid(user: str | None, problems: list[str]) -> int | None:
    if user is None:
        return os.geteuid()
    if user.isdecimal():
        if int(user) <= MAX_UID:
            return int(user)
        problems.append(f"--uid: {quoted(user)} is not within the uids 0-{MAX_UID}")
        return None
    from agent.host.users import uid_of

    uid = uid_of(user)
    if uid is None:
        problems.append(f"--uid: there is no user {quoted(user)} on this host; give a uid")
    return uid


def _cgroup(path: str | None, policy: Policy, problems: list[str]) -> str | None:
    """The path of the process's control group; None where nobody asks for it."""
    if path is None:
        from agent.host import cgroups

        return cgroups.of_process("self") if policy.cgroup else None
    from agent.config_values import BadValueError, read_cgroup

    try:
        return read_cgroup(path, problems.append)
    except BadValueError as error:
        problems.append(f"--process-cgroup: {error}")
        return None


def _joined(address: Address, port: int | None) -> str:
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _data(connection: Connection, verdict: Verdict) -> dict[str, object]:
    import dataclasses

    return {
        "connection": dataclasses.asdict(connection),
        "action": verdict.action,
        "port": verdict.port,
        "zone": verdict.zone,
        "rule": verdict.rule,
        "reason": verdict.reason,
        "steps": [dataclasses.asdict(step) for step in verdict.steps],
    }


def _print(which: str, connection: Connection, verdict: Verdict) -> None:
    owner = f", uid {connection.uid}" if connection.uid is not None else ""
    if connection.cgroup is not None:
        owner += f", cgroup /{connection.cgroup}"
    click.echo(
        f"{connection.direction} {connection.protocol} from {_joined(connection.source, connection.source_port)} "
        f"to {_joined(connection.destination, connection.destination_port)} via {connection.interface}{owner} "
        f"({which} policy)"
    )
    action = f"{verdict.action} to port {verdict.port}" if verdict.port else str(verdict.action)
    zone = f", in conntrack zone {verdict.zone}" if verdict.zone else ""
    click.secho(f"verdict: {action}{zone}", bold=True)
    click.echo(f"because: {verdict.reason} ({verdict.rule})")
    click.echo("\nrules asked, in order:")
    for step in verdict.steps:
        click.echo(f"  {'applies' if step.applied else '-':<7}  {step.rule:<3} {step.text}")

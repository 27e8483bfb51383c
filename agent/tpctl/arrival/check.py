"""`tpctl check`: the probes of the installed policy on this host, in a process of their own that leaves nothing behind.

The command and its child hold the scratch namespace, and the child holds the sockets. When the command is killed, the
child sees the end of a pipe, and clears up. When the child is killed, the kernel closes its sockets, which resets their
connections, and the command clears up. When both are, the kernel removes the namespace with all that hangs on it
(`tpctl.arrival.cable`). Only conntrack then keeps entries for a while: of a connection that was reset ten seconds
(nf_conntrack_tcp_timeout_close), of a query thirty.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import os
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tpctl.arrival import aftermath, beside, drop_reasons
from tpctl.arrival.cable import leaves_by
from tpctl.arrival.model import Fate, Kind, Outcome, Probe, Result
from tpctl.arrival.outside import Outside
from tpctl.arrival.places import Audience, Ports, destinations, reserve_ports, stand_ins, transparent
from tpctl.arrival.plan import Plan, Scene, plan
from tpctl.arrival.sending import CARRY_SECONDS, Sender
from tpctl.host import cgroups, routes
from tpctl.rehearsal.choices import application_uid
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.connection import Direction
from tpctl.spec.decide import decide
from tpctl.spec.policy import Protocol, WhenProxyDown
from tpctl.system import child
from tpctl.system.errors import ApplyError, HostError, described

if TYPE_CHECKING:
    from tpctl.record.state import State

LIMIT_SECONDS = 40.0
"""For the child: far more than it takes, however busy the host is."""
_MOST_PORTS = 4


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the probes."""

    results: tuple[Result, ...] = ()
    skipped: tuple[str, ...] = ()
    """What could not be probed, and why."""

    @property
    def astray(self) -> tuple[Result, ...]:
        """The probes that were lost, or went past the data plane."""
        return tuple(one for one in self.results if one.outcome.fate in (Fate.LOST, Fate.PASSED_BY))

    @property
    def refused(self) -> tuple[Result, ...]:
        """Those that nobody was there to take."""
        return tuple(one for one in self.results if one.outcome.fate is Fate.REFUSED)


def check(record: State) -> Report:
    """Send the probes of an installed policy. Raises nothing: what stands in the way is said as skipped."""
    policy = record.policy
    if not policy.families:
        return Report()
    try:
        with Outside(policy) as outside:
            try:
                return _by_child(record, outside)
            except (child.ChildFailedError, ApplyError):
                time.sleep(CARRY_SECONDS)  # the data plane may still call on what the child had sent
                aftermath.end(outside.addresses())
                drop_reasons.remove_left_over()
                raise
    except (child.ChildFailedError, ApplyError, HostError, OSError) as error:
        why = str(error) if isinstance(error, child.ChildFailedError) else described(error)
        return Report(skipped=(f"every direction: {why}",))


def _by_child(record: State, outside: Outside) -> Report:
    reading, writing = os.pipe2(os.O_CLOEXEC)  # the child sees this process go by its end
    try:
        said = child.in_child(
            lambda: _in_child(record, outside, reading, writing),
            seconds=LIMIT_SECONDS,
            what="the probes have not ended",
            why="and were given up",
        )
        report: Report = pickle.loads(base64.b64decode(said))  # noqa: S301 - it comes from our own child
        return report
    finally:
        os.close(reading)
        os.close(writing)


def _in_child(record: State, outside: Outside, alive: int, held: int) -> str:
    os.close(held)
    os.setsid()  # Ctrl-C is for the command, whose end is seen by the pipe
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        report = _probed(record, outside, alive)
    except InterruptedError:  # nobody is left to do it
        outside.close()
        raise
    return base64.b64encode(pickle.dumps(report)).decode("ascii")


def _probed(record: State, outside: Outside, alive: int) -> Report:
    policy, cable = record.policy, outside.cable
    host = Namespace.current()
    ports = reserve_ports(policy, cable.ends.items(), 2) if policy.inbound.enabled else Ports(())
    scene = Scene(cable.ends, cable.name, cgroups.of_process("self"), routes.is_local, outside.networks, ports.numbers)
    audience = Audience()
    planned = _possible(plan(policy, scene), record, outside, audience)
    with contextlib.closing(_sender(record, planned, outside, ports, audience, host)) as sender:
        results = _results(sender, planned.probes, _KnownPorts(record, audience), alive)
    missing = (f"IPv{family}: {why}" for family, why in cable.missing.items())
    return Report(results, (*missing, *planned.skipped, *outside.missing, *_beyond(record)))


def _beyond(record: State) -> Iterator[str]:
    """Clients whom the probes, which come from a link of this host, do not stand for."""
    for family in sorted(record.policy.families if record.policy.inbound.enabled else ()):
        if why := beside.way_of_answers(family):
            yield f"{Kind.INBOUND} over IPv{family} from clients beyond this host's own links: {why}"


def _sender(
    record: State, planned: Plan, outside: Outside, ports: Ports, audience: Audience, host: Namespace
) -> Sender:
    """What sends the probes, with the sockets where they may end."""
    places = [*destinations(planned.probes, outside, ports)]
    policy, is_ebpf = record.policy, record.options.engine == "ebpf"
    for place in stand_ins(policy, planned.probes, outside, audience, everywhere=is_ebpf):
        if policy.inbound.is_transparent:
            transparent(place)
        places.append(place)
    return Sender(outside, places, audience, host, policy.proxy_uid)


def _possible(planned: Plan, record: State, outside: Outside, audience: Audience) -> Plan:
    """The plan without the probes that this host does not let us send, or that would leave it."""
    probes, skipped = [], list(planned.skipped)
    for probe in planned.probes:
        why = _obstacle(probe, record, outside, audience)
        if why:
            skipped.append(f"{probe.name}: {why}")
        else:
            probes.append(probe)
    return Plan(tuple(probes), tuple(skipped))


def _obstacle(probe: Probe, record: State, outside: Outside, audience: Audience) -> str | None:
    policy, connection, cable = record.policy, probe.connection, outside.cable
    to = connection.destination
    assert probe.expected.port is not None
    listens = audience.at(Protocol(connection.protocol), probe.expected.port, probe.family)
    if policy.when_proxy_down is WhenProxyDown.BYPASS and not listens:
        return "nothing listens on the data plane's port, and connections go straight on meanwhile"
    is_own = connection.direction is Direction.OUTBOUND
    if record.options.engine == "ebpf" and is_own and not _is_below(record.options.ebpf_cgroup):
        return f"this process is not in {record.options.ebpf_cgroup}, where the programs are"
    if probe.kind is Kind.DNS and connection.interface == cable.name and to != cable.ends[probe.family].far:
        try:
            cable.lead(to)
        except FileExistsError:
            pass  # over UDP and TCP
        except OSError as error:
            return f"a query to {to} would leave this host if it were not redirected: {error.strerror}"
        return None
    if connection.interface != cable.name and not outside.is_called_by(probe):
        return None
    users = {"an application": application_uid(policy), "the data plane": policy.proxy_uid}
    return leaves_by(cable.ends[probe.family].far, cable.index, users)


def _is_below(directory: str) -> bool:
    """Whether this process is in the control group of a directory, or in one below it."""
    if not directory:
        return True
    own = cgroups.of_process("self")
    with contextlib.suppress(HostError, OSError):
        return own is not None and (cgroups.root() / own).resolve().is_relative_to(Path(directory).resolve())
    return False


class _KnownPorts:
    """Another try for inbound connections that keep their port: a firewall may let only some ports in, rightly."""

    def __init__(self, record: State, audience: Audience) -> None:
        self._policy = record.policy
        self._audience = audience
        self._keeps_port = record.policy.inbound.is_transparent or record.options.engine == "ebpf"

    def instead_of(self, probe: Probe) -> list[Probe]:
        """The same probe to ports on which an application listens."""
        if not self._keeps_port or probe.kind is not Kind.INBOUND:
            return []
        ports = itertools.islice(self._audience.applications(self._policy, probe.family), _MOST_PORTS)
        return [self._to_port(probe, port) for port in ports]

    def _to_port(self, probe: Probe, port: int) -> Probe:
        connection = dataclasses.replace(probe.connection, destination_port=port, source_port=None)
        return Probe(probe.kind, connection, decide(self._policy, connection))


def _results(sender: Sender, probes: tuple[Probe, ...], known: _KnownPorts, alive: int) -> tuple[Result, ...]:
    results = [Result(*end) for end in sender.send(probes, alive)]
    lost = [at for at, one in enumerate(results) if one.outcome.fate is Fate.LOST]
    if lost:
        second = _once_more(sender, [results[at].probe for at in lost], known, alive)
        for at, result in zip(lost, second, strict=True):
            results[at] = result
    return tuple(_explained(one) for one in results)


def _explained(result: Result) -> Result:
    if result.outcome.fate is not Fate.PASSED_BY or result.finding:
        return result
    from tpctl.arrival.diagnosis import why_passed_by

    return dataclasses.replace(result, finding=why_passed_by(result.probe))


def _once_more(sender: Sender, lost: list[Probe], known: _KnownPorts, alive: int) -> Iterator[Result]:
    """Send what was lost again, and look where it gets lost; the second time counts, for this host may be busy.

    Other ports are tried at the same time. All in one round: each costs the patience that an answer is waited for.
    """
    from tpctl.arrival.diagnosis import diagnose

    others = [known.instead_of(probe) for probe in lost]
    ends: list[tuple[Probe, Outcome]] = []

    def again(probes: Sequence[Probe]) -> list[tuple[Probe, Outcome]]:
        ends[:] = sender.send([*probes, *itertools.chain.from_iterable(others)], alive)
        return ends[: len(probes)]

    findings = diagnose(lost, again)
    rest = iter(ends[len(lost) :])
    for end, tried, finding in zip(ends, others, findings, strict=False):
        elsewhere = [*itertools.islice(rest, len(tried))]
        through = next((one for one in elsewhere if one[1].fate in (Fate.ARRIVED, Fate.PASSED_BY)), None)
        if through and end[1].fate is Fate.LOST:
            closed = f"port {end[0].connection.destination_port}, which nobody uses, is closed on the way"
            detail = f"{through[1].detail} (to port {through[0].connection.destination_port}); {closed}"
            yield Result(through[0], dataclasses.replace(through[1], detail=detail))
        else:
            yield Result(*end, finding)

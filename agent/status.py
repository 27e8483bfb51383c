"""What is installed, whether the kernel still holds it, and whether the data plane is there to answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import agent
from agent import confirm, draining, routing, state
from agent.engine_options import EngineOptions
from agent.engines import registry
from agent.engines.base import Inspection
from agent.errors import ApplyError, HostError
from agent.host.proc import in_first_namespace
from agent.host.sockets import Listener, listeners
from agent.policy import DnsCapture, Family, Policy, Protocol, WhenProxyDown


@dataclass(frozen=True, slots=True)
class Expected:
    """A port on which the data plane should listen."""

    role: str
    protocol: Protocol
    port: int


@dataclass(frozen=True, slots=True)
class PortStatus:
    """Who listens on such a port."""

    role: str
    protocol: Protocol
    port: int
    uids: tuple[int, ...]
    """The owners of the listening sockets; empty when nothing listens."""
    problem: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `tpctl status` tells."""

    record: state.State | None
    inspection: Inspection
    ports: tuple[PortStatus, ...]
    problems: tuple[str, ...]
    """What is not as it should be; empty when all is well."""
    draining: int = 0
    """Connections through the data plane that an uninstall lets finish; a table without redirects stays until then."""
    pending: confirm.Pending | None = None
    """A change that awaits its confirmation."""
    next_boot: tuple[str, ...] | None = None
    """What will install something at the next boot; None where a boot means nothing, in other network namespaces."""


def report() -> Report:
    """Read the record and the kernel of this network namespace. Raises HostError when there is no tool to look with."""
    record = state.load()
    options = record.options if record else EngineOptions()
    recorded = options.engine if record else None
    found: dict[str, Inspection] = {}
    for engine in registry.available(options):
        plan = engine.plan(record.policy) if record and engine.name == recorded else None
        found[engine.name] = engine.inspect(plan)
    if not found:
        raise HostError("this host has neither nftables nor iptables; install one of them")
    holding = [name for name, inspection in found.items() if inspection.installed]
    shown = found[recorded if recorded in holding else (holding or list(found))[0]]
    ports = tuple(_ports(record.policy)) if record and shown.installed else ()
    running = _tidied(record, holding)
    transparent = record is not None and record.policy.inbound.is_transparent and shown.installed
    can_look = recorded is None or recorded in found or recorded == "ebpf"  # whose pins tell that it has gone
    problems = [*_problems(record, shown, ports, can_look=can_look)]
    if record and transparent and not record.policy.families <= routing.present():
        problems.append(
            f"the rule or route of the routing table {routing.TABLE} is missing: answers to clients in whose name the "
            "data plane dials leave this host; `tpctl apply` brings them back"
        )
    if record and shown.installed:
        problems += firewall_problems(record.policy, shown.engine)
    problems += [f"the {name} engine's rules are installed as well" for name in holding if name != shown.engine]
    problems += [f"{foreign} are installed" for one in found.values() for foreign in one.foreign]
    pending = confirm.load()
    if pending and pending.is_overdue:
        problems.append(
            f"a change ({pending.command}) was neither confirmed nor taken back in time: its guardian is gone; "
            "run `tpctl confirm` or `tpctl rollback`; the next install or apply takes it back, too"
        )
    return Report(record, shown, ports, tuple(problems), running, pending, _next_boot())


def _tidied(record: state.State | None, holding: list[str]) -> int:
    """Remove what an earlier uninstall left, if nothing needs it any more; hands back how many connections still do.

    Not while another tpctl works, nor after it has: until its rules are there, what it needs for them looks left over.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(state.locked(wait=0.0))
        except ApplyError:
            return 0
        if state.load() != record:
            return 0
        running = 0 if "nftables" in holding else draining.tidy()
        if not holding or (record and not record.policy.inbound.is_transparent):
            running += draining.tidy_answers()[0]
        if not holding:  # a redirected connection may be counted already
            running = max(running, draining.tidy_address("lo")[0])
        return running


def _next_boot() -> tuple[str, ...] | None:
    if not in_first_namespace():
        return None
    from agent.persist.outlook import next_boot

    return next_boot()


def port_problems(policy: Policy) -> tuple[str, ...]:
    """What is wrong with the data plane's listeners, for a policy that has just been installed."""
    if policy.when_proxy_down is WhenProxyDown.BYPASS:
        return ()
    return tuple(port.problem for port in _ports(policy) if port.problem)


def firewall_problems(policy: Policy, engine: str) -> tuple[str, ...]:
    """What this host's firewall does to redirected connections."""
    from agent.persist import firewalld

    redirects = policy.outbound.enabled or policy.dns.capture is not DnsCapture.OFF
    if engine == "ebpf" or not redirects or Family.IPV6 not in policy.families:
        return ()
    if not firewalld.rejects_redirected_ipv6():
        return ()
    return (
        "firewalld rejects this host's IPv6 connections when they are redirected: set RFC3964_IPv4=no in "
        "/etc/firewalld/firewalld.conf and run `firewall-cmd --reload`, or leave IPv6 alone (--ip-family-mode ipv4)",
    )


def expected_ports(policy: Policy) -> Iterator[Expected]:
    """The ports a policy sends traffic to."""
    if policy.inbound.enabled:
        yield Expected("inbound", Protocol.TCP, policy.inbound.port)
    if policy.outbound.enabled or policy.virtual_networks:
        yield Expected("outbound", Protocol.TCP, policy.outbound.port)
    if policy.dns.capture is not DnsCapture.OFF or policy.virtual_networks:
        yield Expected("dns", Protocol.UDP, policy.dns.port)
        if policy.dns.tcp:
            yield Expected("dns", Protocol.TCP, policy.dns.port)


def port_status(expected: Expected, policy: Policy, found: Iterable[Listener]) -> PortStatus:
    """Judge the listeners of one port. Pure."""
    mine = [listener for listener in found if listener.port == expected.port]
    uids = tuple(sorted({listener.uid for listener in mine}))
    problem = None
    where = f"{expected.protocol} port {expected.port} ({expected.role})"
    if not mine:
        bypass = policy.when_proxy_down is WhenProxyDown.BYPASS
        meanwhile = "connections go past the data plane" if bypass else "redirected connections are refused"
        problem = f"nothing listens on {where}: {meanwhile}"
    elif any(uid != policy.proxy_uid for uid in uids):
        wrong = ", ".join(str(uid) for uid in uids if uid != policy.proxy_uid)
        problem = (
            f"the listener on {where} runs as uid {wrong}, not as the data plane user {policy.proxy_uid}: "
            "its own connections are redirected back to it"
        )
    elif expected.role == "inbound" and all(listener.address.is_loopback for listener in mine):
        problem = (
            f"the listener on {where} is bound to loopback: connections from other hosts are refused; bind 0.0.0.0"
        )
    return PortStatus(expected.role, expected.protocol, expected.port, uids, problem)


def _ports(policy: Policy) -> Iterator[PortStatus]:
    found = {protocol: listeners(protocol) for protocol in Protocol}
    return (port_status(expected, policy, found[expected.protocol]) for expected in expected_ports(policy))


def _problems(
    record: state.State | None, inspection: Inspection, ports: Iterable[PortStatus], *, can_look: bool
) -> Iterator[str]:
    if record and record.phase != state.INSTALLED:
        yield "an install was interrupted; run `tpctl install` again, or `tpctl uninstall`"
    if record and inspection.installed and inspection.engine != record.options.engine:
        recorded = record.options.engine
        yield f"the {recorded} engine is on record, but the {inspection.engine} engine's rules are installed"
    if record and not can_look:
        yield (
            f"the {record.options.engine} engine has installed rules here, by the record, but what it takes to see "
            "them is gone: install it again"
        )
    elif record and not inspection.installed:
        yield "tpctl is on record, but the kernel holds none of its rules; `tpctl apply` brings them back"
    if inspection.installed and not record:
        by = f" {inspection.version}" if inspection.version else ""
        yield f"rules of tpctl{by} are installed, but there is no record of the policy; run `tpctl install` again"
    elif inspection.version and inspection.version != agent.__version__:
        yield (
            f"tpctl {inspection.version} installed the rules, and this is tpctl {agent.__version__}: `tpctl apply` "
            "replaces them without a gap"
        )
    if inspection.drift:
        yield "the kernel's rules differ from the plan: see drift; `tpctl apply` puts them right"
    yield from (port.problem for port in ports if port.problem)

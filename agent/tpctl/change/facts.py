"""What the host says now, beside the policy that was installed: the recorded configuration, resolved once more.

A policy holds facts of the day it was made: uids, name servers, families, the name of the loopback interface. They are
asked for again here. The guard of an ssh session is not among them: it belongs to the session of the install.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tpctl.config import inputs
from tpctl.config.effective import Config
from tpctl.config.resolve import resolve
from tpctl.engines.base import Engine
from tpctl.host import interfaces
from tpctl.host.facts import LiveHost
from tpctl.record.state import State
from tpctl.spec.policy import Cgroup, DnsCapture, Family, Policy
from tpctl.system.errors import HostError, InputError

DOCKER_ZONES = (
    "DNS queries are not kept in conntrack zones: all DNS is captured, and Docker's embedded DNS server "
    "rewrites ports of the same queries"
)


class Now(NamedTuple):
    """The policy as it would be made today."""

    policy: Policy
    """The one on record, where the configuration cannot be resolved any more."""
    changes: tuple[str, ...] = ()
    """What differs from the one on record, in words."""
    problems: tuple[str, ...] = ()
    """Why the configuration cannot be resolved any more."""


def now(record: State, engine: Engine[Any]) -> Now:
    """Resolve the configuration on record once more. A record without one, of an older version, stays as it is.

    The control group stays the recorded one: a service that was started anew is seen to elsewhere.
    """
    if record.inputs is None:
        return Now(record.policy)
    try:
        config = inputs.from_document(record.inputs)
        resolved = resolve(config._replace(ssh_guard=False), _WithCgroup(record.policy.cgroup))
    except (InputError, HostError) as error:
        problems = error.problems if isinstance(error, InputError) else (str(error),)
        return Now(record.policy, problems=tuple(problems))
    except (KeyError, TypeError, ValueError) as error:
        return Now(record.policy, problems=(f"the configuration on record cannot be read ({error!r})",))
    policy, _ = adapted(resolved.policy.through(engine.name), engine)
    policy = dataclasses.replace(policy, inbound=record.policy.inbound)
    about_servers = f"warning: {config.resolv_conf}: "
    remarks = [one.removeprefix(about_servers) for one in resolved.notices if one.startswith(about_servers)]
    return Now(policy, tuple(_changes(config, record.policy, policy, remarks)))


class _WithCgroup(LiveHost):
    def __init__(self, recorded: Cgroup | None) -> None:
        self._recorded = recorded

    def cgroup(self, path: str) -> Cgroup:
        return self._recorded or super().cgroup(path)


def _changes(config: Config, before: Policy, after: Policy, remarks: Iterable[str]) -> Iterator[str]:
    """`remarks` are about resolv.conf, and may say why it comes to something else than it seems."""
    if before.proxy_uid != after.proxy_uid:
        user = " ".join(("the data plane's user", config.proxy_user)).strip()
        yield f"{user} has the uid {after.proxy_uid} now, and the rules name {before.proxy_uid}"
    if before.dns.servers != after.dns.servers:
        held, wanted = (", ".join(map(str, policy.dns.servers)) or "nobody" for policy in (before, after))
        because = "".join(f" ({remark})" for remark in remarks)
        yield f"{config.resolv_conf} names {wanted} now{because}, and the rules capture DNS queries to {held}"
    if before.outbound.exclude_marks != after.outbound.exclude_marks:
        held, wanted = (", ".join(map(str, policy.outbound.exclude_marks)) or "none" for policy in (before, after))
        yield f"this host now routes connections with these marks apart: {wanted}; the rules leave these alone: {held}"
    for family in sorted(after.families - before.families):
        yield f"IPv{family} is turned on now, and goes past the data plane"
    for family in sorted(before.families - after.families):
        yield f"IPv{family} is turned off now, and the rules redirect it"
    if before.loopback != after.loopback:
        yield f"the loopback interface is called {after.loopback} now, and the rules name {before.loopback}"
    same_marks = dataclasses.replace(after.outbound, exclude_marks=before.outbound.exclude_marks)
    after = dataclasses.replace(after, outbound=same_marks)
    named = {"proxy_uid", "dns", "families", "loopback"}
    others = [
        field.name.replace("_", " ")
        for field in dataclasses.fields(before)
        if field.name not in named and getattr(before, field.name) != getattr(after, field.name)
    ]
    if dataclasses.replace(before.dns, servers=()) != dataclasses.replace(after.dns, servers=()):
        others.append("DNS")
    if others:
        yield f"the configuration on record comes to something else now ({', '.join(others)})"


def guarded(policy: Policy, engine: Engine[Any]) -> tuple[Policy, list[str]]:
    """The policy, without the guard of the data plane's ports where the engine cannot have it; and notices."""
    obstacle = engine.unguarded(policy) if policy.guard_ports else None
    if obstacle is None:
        return policy, []
    text = f"warning: the data plane's own ports are not guarded, as with --no-guard-ports: {obstacle}"
    return dataclasses.replace(policy, guard_ports=False), [text]


def adapted(policy: Policy, engine: Engine[Any]) -> tuple[Policy, list[str]]:
    """The policy, less what this host's software rules out; and notices."""
    policy, notices = guarded(policy, engine)
    if policy.dns.capture is DnsCapture.ALL and policy.dns.split_zones:
        from tpctl.engines.others import has_docker_dns

        if has_docker_dns():
            policy = dataclasses.replace(policy, dns=dataclasses.replace(policy.dns, split_zones=False))
            notices.append(DOCKER_ZONES)
    lacking = policy.families - engine.families
    if lacking == {Family.IPV6} and not interfaces.has_ipv6(policy.loopback):
        policy = dataclasses.replace(policy, families=policy.families - lacking)
        notices.append(
            "IPv6 is left alone, because no interface but loopback has an IPv6 address, and this host has no iptables "
            "programs for it; tpctl status tells when there is an address"
        )
    return policy, notices


def notices(current: Now) -> list[str]:
    """What an `apply` tells of them."""
    kept = "warning: the policy on record is kept as it is, for its configuration does not fit this host any more"
    return [
        *(f"brought up to date: {change}" for change in current.changes),
        *(f"{kept}: {problem}" for problem in current.problems),
    ]


def problems(current: Now) -> list[str]:
    """What `status` tells of them."""
    return [
        *(f"the host has changed since the install: {change}; `tpctl apply` follows it" for change in current.changes),
        *(f"an install of the configuration on record would be refused now: {one}" for one in current.problems),
    ]

"""The door through which an engine joins the suite: a name, and how to get the engine ready in a host's namespace.

The suite asks nothing else of an engine than what `tpctl.engines.base.Engine` has: `plan` and `apply`. An engine that
needs more around it than a namespace (a cgroup for the processes that open sockets, say) gives a `surroundings`, and
one that refuses some policies says by `possible` what is left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from tests.legacy_ways import without_python_iptables
from tpctl.engines.base import Engine
from tpctl.engines.registry import select
from tpctl.rehearsal.cgroup import OwnPlace, own_place
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Policy, Redirection, WhenProxyDown


def as_it_is(policy: Policy) -> Policy:
    """All of it."""
    return policy


@dataclass(frozen=True, slots=True)
class Door:
    """How one engine is tested."""

    name: str
    load: Callable[[], Engine[Any]]
    """Called inside the host's namespace, once for each laboratory."""
    surroundings: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered around everything that is done with the engine."""
    possible: Callable[[Policy], Policy] = as_it_is
    """What an engine can carry out of a policy; the rest is refused, and tested elsewhere."""


def _through(options: EngineOptions) -> Callable[[], Engine[Any]]:
    return lambda: select(options).engine


def by_ebpf(policy: Policy) -> Policy:
    """The policy without what the eBPF engine refuses."""
    bypass = policy.when_proxy_down is WhenProxyDown.BYPASS
    return replace(
        policy,
        virtual_networks=() if bypass else policy.virtual_networks,
        exclude_interfaces=(),
        log_level=None,
        inbound=replace(policy.inbound, mode=Redirection.REDIRECT),
    ).through("ebpf")


def ebpf_door(*, chooses_sockets: bool | None = None) -> Door:
    """The eBPF engine, attached to a cgroup of our own; if so wished, as on a kernel without sk_lookup."""
    places: list[OwnPlace] = []

    @contextmanager
    def surroundings() -> Iterator[None]:
        with own_place() as place:
            places.append(place)
            yield

    return Door("ebpf", lambda: places[-1].engine(chooses_sockets=chooses_sockets), surroundings, by_ebpf)


DOORS = {
    door.name: door
    for door in (
        Door("nftables", _through(EngineOptions(engine="nftables"))),
        Door("iptables-nft", _through(EngineOptions(engine="iptables", iptables_mode="nft"))),
        Door("iptables-legacy", _through(EngineOptions(engine="iptables", iptables_mode="legacy"))),
        Door(
            "iptables-legacy-restore",
            _through(EngineOptions(engine="iptables", iptables_mode="legacy")),
            without_python_iptables,
        ),
        ebpf_door(),
    )
}

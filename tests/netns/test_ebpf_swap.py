"""eBPF policies are swapped while applications open connections without pause: none leaks, fails or is cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from agent.engines.ebpf.engine import EbpfEngine
from agent.policy import Policy
from agent.rehearsal.cgroup import own_place
from agent.rehearsal.namespaces import Namespace
from tests.swap.scene import inbound, outbound, prepared_namespaces
from tests.swap.swaps import EXCLUDING, POLICIES
from tests.swap.traffic import APP, FAMILIES, INBOUND, OUTBOUND, PROXY, REAL, REAL_PORT, Applications, Kept, Servers

pytestmark = pytest.mark.root

SWAPS = int(os.environ.get("TPCTL_SWAPS", "18"))
CONNECTIONS = 20 * SWAPS


@contextlib.contextmanager
def served() -> Iterator[tuple[Namespace, Namespace, EbpfEngine]]:
    """A host with a data plane and a server, a peer with a server, and the engine."""
    with own_place() as place, prepared_namespaces() as (host, peer):
        running = [
            Servers(host, PROXY, {15001: OUTBOUND, 15006: INBOUND}),
            Servers(host, APP, {REAL_PORT: REAL}),
            Servers(peer, 0, {REAL_PORT: REAL}),
        ]
        try:
            with host.inside():
                engine = place.engine()
            yield host, peer, engine
        finally:
            for servers in running:
                servers.stop()


def possible(policy: Policy) -> Policy:
    return replace(policy, virtual_networks=(), drop_invalid=False)


def apply(host: Namespace, engine: EbpfEngine, policies: Sequence[Policy]) -> None:
    with host.inside():
        for policy in policies:
            engine.apply(engine.plan(possible(policy)))


def test_nothing_leaks_fails_or_is_cut() -> None:
    with served() as (host, peer, engine):
        apply(host, engine, POLICIES[:1])
        kept = [
            Kept(host, APP, [outbound(family) for family in FAMILIES]),
            Kept(peer, 0, [inbound(family) for family in FAMILIES]),
        ]
        applications = Applications(
            [
                *((host, APP, outbound(family)) for family in FAMILIES),
                *((peer, 0, inbound(family)) for family in FAMILIES),
            ]
        )
        applications.resume()
        apply(host, engine, [POLICIES[number % len(POLICIES)] for number in range(1, SWAPS + 1)])
        seen = applications.stop()
        assert (seen.leaked, seen.failed) == (0, 0), seen
        assert seen.connections >= CONNECTIONS
        with host.inside():
            engine.remove()
        # Nothing of a connection was ever translated, so nothing has to stay for it.
        assert [complaint for group in kept for complaint in group.broken()] == []
        for group in kept:
            group.close()


def test_what_is_excluded_is_never_redirected() -> None:
    with served() as (host, _, engine):
        apply(host, engine, EXCLUDING[:1])
        applications = Applications([(host, APP, outbound(family, REAL)) for family in FAMILIES])
        applications.resume()
        apply(host, engine, [EXCLUDING[number % len(EXCLUDING)] for number in range(1, SWAPS + 1)])
        seen = applications.stop()
        assert seen.failed == 0, seen.reasons
        assert seen.connections >= CONNECTIONS // 2


def test_installing_and_removing_breaks_no_connection() -> None:
    with served() as (host, peer, engine):
        applications = Applications(
            [
                *((host, APP, outbound(family)) for family in FAMILIES),
                *((peer, 0, inbound(family)) for family in FAMILIES),
            ]
        )
        applications.resume()
        for _ in range(SWAPS // 3):
            apply(host, engine, POLICIES[:1])
            with host.inside():
                engine.remove()
        seen = applications.stop()
        assert seen.failed == 0, seen.reasons
        assert seen.leaked > 0
        assert seen.proxied > 0

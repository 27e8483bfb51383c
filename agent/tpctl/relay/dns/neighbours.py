"""Whom a DNS listener without access rules answers: this host, and the networks it is attached to.

Whoever is farther away could have somebody else's name looked up here that he may not see, or have answers sent to an
address that is not his. dnsmasq has the same rule for the same reason (`--local-service`, dnsmasq(8)).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from ipaddress import ip_address

from tpctl.relay.connections import routes
from tpctl.relay.loop.complaints import Complaints

_REMEMBERED = 4096
_SECONDS = 10.0
"""How long an answer of the kernel's is used: routes change seldom, and every query would cost a question."""


class Neighbours:
    """Says of an address whether it may ask."""

    def __init__(
        self,
        complaints: Complaints,
        is_near: Callable[[str], bool] = routes.is_near,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._complaints = complaints
        self._is_near = is_near
        self._clock = clock
        self._known: dict[str, bool] = {}
        self._since = clock()

    def __call__(self, host: str) -> bool:
        """True for an address of this host, and for one that is reached without a router."""
        now = self._clock()
        if now - self._since > _SECONDS or len(self._known) >= _REMEMBERED:
            self._known, self._since = {}, now
        verdict = self._known.get(host)
        if verdict is None:
            verdict = self._known[host] = _is_loopback(host) or self._is_near(host)
        if not verdict:
            self._complaints.warn(
                "refused: a DNS query from a network this host is not attached to; see access", client=host
            )
        return verdict


def _is_loopback(host: str) -> bool:
    return ip_address(host.partition("%")[0]).is_loopback

"""The routing rule and route that bring an application's answers to a client's address back to the data plane.

With `--inbound-mode tproxy` the data plane may dial the application from the client's own address. The engines give the
answers the mark `ROUTE_MARK`; the rule sends what has it to a table of its own, and the route there keeps it on this
host, whatever address it is for. Both carry a protocol number (rt_protos) that nobody else has, so that uninstall finds
them without any record, and leaves those of others.

No sysctl has to be changed. A packet that is routed anew on its way out keeps that route over the loopback interface,
so neither rp_filter nor the test for martian addresses, which stand where packets are routed on their way in, sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from agent.engines.base import ROUTE_MARK
from agent.errors import ApplyError
from agent.policy import Family

if TYPE_CHECKING:
    from pyroute2.iproute import IPRoute

TABLE = 1506
"""Of the route; nothing else should be in it."""
PRIORITY = 1506
"""Of the rule: behind the table local (0), before main (32766) and what VPNs put before that."""
PROTOCOL = 158
"""Who made rule and route (rtnetlink(7), rtm_protocol). /etc/iproute2/rt_protos knows nobody of that number."""
_RTN_LOCAL = 2
_SCOPE_HOST = 254
_ALL_ADDRESSES = {Family.IPV4: "0.0.0.0/0", Family.IPV6: "::/0"}
_AF = {Family.IPV4: 2, Family.IPV6: 10}


_RULE = {"table": TABLE, "priority": PRIORITY, "fwmark": ROUTE_MARK, "fwmask": ROUTE_MARK, "protocol": PROTOCOL}


def present() -> frozenset[Family]:
    """The families that have both the rule and the route."""
    with _netlink("read") as netlink:
        return frozenset(family for family in Family if _has_rule(netlink, family) and _has_route(netlink, family))


def add(interface: str, families: Iterable[Family]) -> frozenset[Family]:
    """Add what is missing of the rule and of the route over the loopback interface; hands back the families without.

    Raises ApplyError when the kernel refuses.
    """
    lacking = frozenset(families) - present()
    if not lacking:
        return lacking
    with _netlink("add") as netlink:
        index = netlink.link_lookup(ifname=interface)[0]
        for family in sorted(lacking):
            if not _has_route(netlink, family):
                netlink.route("add", **_route(family), oif=index)
            if not _has_rule(netlink, family):
                netlink.rule("add", family=_AF[family], **_RULE)
    return lacking


def remove(families: Iterable[Family] = tuple(Family), *, dry_run: bool = False) -> tuple[str, ...]:
    """Remove the rule and the route; hands back what went, or would. Raises ApplyError when the kernel refuses."""
    removed = []
    with _netlink("remove") as netlink:
        for family in sorted(families):
            version = "" if family is Family.IPV4 else "-6 "
            if _has_rule(netlink, family):
                removed.append(f"ip {version}rule fwmark {ROUTE_MARK:#x}/{ROUTE_MARK:#x} lookup {TABLE}")
                if not dry_run:
                    netlink.rule("del", family=_AF[family], **_RULE)
            if _has_route(netlink, family):
                removed.append(f"ip {version}route local default table {TABLE}")
                if not dry_run:
                    netlink.route("del", **_route(family))
    return tuple(removed)


def _route(family: Family) -> dict[str, Any]:
    return {
        "family": _AF[family],
        "dst": _ALL_ADDRESSES[family],
        "table": TABLE,
        "type": _RTN_LOCAL,
        "scope": _SCOPE_HOST,
        "proto": PROTOCOL,
    }


def _has_rule(netlink: IPRoute, family: Family) -> bool:
    wanted = {"FRA_TABLE": TABLE, "FRA_PROTOCOL": PROTOCOL, "FRA_FWMARK": ROUTE_MARK, "FRA_FWMASK": ROUTE_MARK}
    return any(wanted.items() <= dict(rule["attrs"]).items() for rule in _listed(netlink.get_rules, family))


def _has_route(netlink: IPRoute, family: Family) -> bool:
    routes = _listed(netlink.get_routes, family, table=TABLE)
    return any((route["proto"], route["type"], route["dst_len"]) == (PROTOCOL, _RTN_LOCAL, 0) for route in routes)


def _listed(listing: Callable[..., Any], family: Family, **criteria: int) -> list[Any]:
    """What the kernel lists; nothing for a family, or a table, that it does not have."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        return list(listing(family=_AF[family], **criteria))
    except NetlinkError:
        return []


@contextlib.contextmanager
def _netlink(verb: str) -> Iterator[IPRoute]:
    from pyroute2.iproute import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as netlink:
            yield netlink
    except (NetlinkError, IndexError) as error:
        raise ApplyError(f"cannot {verb} the routing rule and route of table {TABLE}: {error}") from error

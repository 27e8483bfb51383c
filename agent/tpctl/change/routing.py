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
import errno
import struct
from collections.abc import Iterable, Iterator

from tpctl.engines.base import ROUTE_MARK
from tpctl.host import interfaces, routes
from tpctl.spec.policy import Family
from tpctl.system import netlink
from tpctl.system.errors import ApplyError
from tpctl.system.netlink import Netlink

TABLE = 1506
"""Of the route; nothing else should be in it."""
PRIORITY = 1506
"""Of the rule: behind the table local (0), before main (32766) and what VPNs put before that."""
PROTOCOL = 158
"""Who made rule and route (rtnetlink(7), rtm_protocol). /etc/iproute2/rt_protos knows nobody of that number."""
_RTN_LOCAL = 2
_SCOPE_HOST = 254
_AF = {Family.IPV4: 2, Family.IPV6: 10}
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_NEWRULE, _RTM_DELRULE, _RTM_GETRULE = 24, 25, 32, 33, 34
_RTA_OIF, _RTA_TABLE = 4, 15
_FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL = 6, 10, 15, 16, 21
_FR_ACT_TO_TBL = 1
"""linux/rtnetlink.h, linux/fib_rules.h"""
_ROUTE = struct.Struct("=BBBBBBBBI")
"""struct rtmsg and struct fib_rule_hdr: family, two lengths, tos, table, protocol, scope, type or action, flags."""
_NEW = netlink.CREATE | netlink.EXCLUSIVE
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP)
_RULE = {_FRA_TABLE: TABLE, _FRA_FWMARK: ROUTE_MARK, _FRA_FWMASK: ROUTE_MARK}


def present() -> frozenset[Family]:
    """The families that have both the rule and the route."""
    with _netlink("read") as kernel:
        return frozenset(family for family in Family if _has_rule(kernel, family) and _has_route(family))


def add(interface: str, families: Iterable[Family]) -> None:
    """Add what is missing of the rule and of the route over the loopback interface. Raises ApplyError on refusal."""
    lacking = frozenset(families) - present()
    if not lacking:
        return
    with _netlink("add") as kernel:
        index = interfaces.index(interface)
        for family in sorted(lacking):
            if not _has_route(family):
                kernel.change(_RTM_NEWROUTE, _route(family, index), _NEW)
            if not _has_rule(kernel, family):
                kernel.change(_RTM_NEWRULE, _rule(family), _NEW)


def remove(families: Iterable[Family] = tuple(Family), *, dry_run: bool = False) -> tuple[str, ...]:
    """Remove the rule and the route; hands back what went, or would. Raises ApplyError when the kernel refuses."""
    removed = []
    with _netlink("remove") as kernel:
        for family in sorted(families):
            version = "" if family is Family.IPV4 else "-6 "
            if _has_rule(kernel, family):
                removed.append(f"ip {version}rule fwmark {ROUTE_MARK:#x}/{ROUTE_MARK:#x} lookup {TABLE}")
                if not dry_run:
                    kernel.change(_RTM_DELRULE, _rule(family))
            if _has_route(family):
                removed.append(f"ip {version}route local default table {TABLE}")
                if not dry_run:
                    kernel.change(_RTM_DELROUTE, _route(family))
    return tuple(removed)


def _route(family: Family, index: int = 0) -> bytes:
    message = _ROUTE.pack(_AF[family], 0, 0, 0, 0, PROTOCOL, _SCOPE_HOST, _RTN_LOCAL, 0)
    return message + netlink.attributes({_RTA_TABLE: TABLE, **({_RTA_OIF: index} if index else {})})


def _rule(family: Family) -> bytes:
    message = _ROUTE.pack(_AF[family], 0, 0, 0, 0, 0, 0, _FR_ACT_TO_TBL, 0)
    return message + netlink.attributes({**_RULE, _FRA_PRIORITY: PRIORITY, _FRA_PROTOCOL: bytes([PROTOCOL])})


def _has_rule(kernel: Netlink, family: Family) -> bool:
    wanted = {kind: struct.pack("=I", value) for kind, value in _RULE.items()} | {_FRA_PROTOCOL: bytes([PROTOCOL])}
    try:
        # All of them are read: the kernel begins no second dump while one is under way.
        held = list(kernel.ask(_RTM_GETRULE, _ROUTE.pack(_AF[family], *[0] * 8), netlink.DUMP))
    except OSError as error:
        if error.errno not in _NO_FAMILY:
            raise
        return False
    rules = (message for message in held if message[0] == _AF[family])
    return any(wanted.items() <= netlink.parse(message[_ROUTE.size :]).items() for message in rules)


def _has_route(family: Family) -> bool:
    return any(held[:3] == (_RTN_LOCAL, PROTOCOL, 0) for held in routes.of_table(_AF[family], TABLE))


@contextlib.contextmanager
def _netlink(verb: str) -> Iterator[Netlink]:
    try:
        with Netlink(netlink.ROUTE) as kernel:
            yield kernel
    except OSError as error:
        raise ApplyError(f"cannot {verb} the routing rule and route of table {TABLE}: {error.strerror}") from error

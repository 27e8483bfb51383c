"""This host's routing rules (ip-rule(8)), and the marks that they treat apart: VPN clients keep their transport out of
a tunnel by them.

Two kinds of rule do that (ip-rule(8)): `fwmark M lookup main`, before one that sends everything into the tunnel
(Tailscale), and `not fwmark M lookup T`, where T is the tunnel (wg-quick). The mark of a socket takes CAP_NET_ADMIN or
CAP_NET_RAW to set (SO_MARK, socket(7)).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

from tpctl.spec.exclusions import MAX_MARK, Mark
from tpctl.spec.policy import Family
from tpctl.system import netlink

_RTM_GETRULE = 34
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK = 1, 2, 3, 6, 10
_FRA_SUPPRESS_PREFIXLEN, _FRA_TABLE, _FRA_FWMASK, _FRA_OIFNAME, _FRA_UID_RANGE = 14, 15, 16, 17, 20
_FIB_RULE_INVERT = 2
_FR_ACT_TO_TBL = 1
_MAIN, _DEFAULT, _LOCAL = 254, 253, 255
_TABLES = {_MAIN: "main", _DEFAULT: "default", _LOCAL: "local"}
_ACTIONS = {2: "goto", 3: "nop", 6: "blackhole", 7: "unreachable", 8: "prohibit"}
_THE_KERNELS = frozenset({(0, _LOCAL), (32766, _MAIN), (32767, _DEFAULT)})
"""Priority and table of the rules that every host begins with."""
_NOTHING_SUPPRESSED = 0xFFFFFFFF
_HEADER = struct.Struct("=BBBBBBBBI")
"""linux/fib_rules.h, struct fib_rule_hdr: family, two lengths, tos, table, two reserved, action, flags."""
_NUMBER = struct.Struct("=I")
_AF = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_NO_RULES = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP)
"""The kernel does without policy routing, or without the family."""


def listed(family: Family) -> tuple[str, ...]:
    """The rules of a family as ip-rule(8) shows them, without those that every host has. Raises OSError."""
    with netlink.Netlink(netlink.ROUTE) as kernel:
        return tuple(text for message in _dumped(kernel, family) if (text := shown(message)))


def shown(message: bytes) -> str:
    """A rule of the kernel as ip-rule(8) shows it, as far as it concerns which packets it takes and where they go."""
    _, to_length, from_length, _, table, _, _, action, flags = _HEADER.unpack_from(message)
    held = netlink.parse(message[_HEADER.size :])
    table = _number(held.get(_FRA_TABLE), table)
    priority = _number(held.get(_FRA_PRIORITY), 0)
    asked = [*_asked(held, from_length, to_length)]
    to_table = action == _FR_ACT_TO_TBL
    if len(asked) == 1 and to_table and (priority, table) in _THE_KERNELS:
        return ""
    does = f"lookup {_TABLES.get(table, table)}" if to_table else _ACTIONS.get(action, f"action {action}")
    suppressed = _number(held.get(_FRA_SUPPRESS_PREFIXLEN), _NOTHING_SUPPRESSED)
    more = "" if suppressed == _NOTHING_SUPPRESSED else f" suppress_prefixlength {suppressed}"
    inverted = "not " if flags & _FIB_RULE_INVERT else ""
    return f"{priority}: {inverted}{' '.join(asked)} {does}{more}"


def _asked(held: dict[int, bytes], from_length: int, to_length: int) -> Iterator[str]:
    yield f"from {ip_address(held[_FRA_SRC])}/{from_length}" if _FRA_SRC in held else "from all"
    if _FRA_DST in held:
        yield f"to {ip_address(held[_FRA_DST])}/{to_length}"
    if _FRA_FWMARK in held:
        mask = _number(held.get(_FRA_FWMASK), MAX_MARK)
        yield f"fwmark {_number(held[_FRA_FWMARK], 0):#x}" + ("" if mask == MAX_MARK else f"/{mask:#x}")
    for word, kind in (("iif", _FRA_IIFNAME), ("oif", _FRA_OIFNAME)):
        if kind in held:
            yield f"{word} {held[kind].rstrip(bytes(1)).decode(errors='replace')}"
    if len(held.get(_FRA_UID_RANGE, b"")) == 8:
        first, last = struct.unpack("=II", held[_FRA_UID_RANGE])
        yield f"uidrange {first}-{last}"


def _dumped(kernel: netlink.Netlink, family: Family) -> Iterator[bytes]:
    """Every rule of a family; none where the kernel does without."""
    try:
        yield from kernel.ask(_RTM_GETRULE, _HEADER.pack(_AF[family], *[0] * 8), netlink.DUMP)
    except OSError as error:
        if error.errno not in _NO_RULES:
            raise


def kept_out_of_tunnels() -> tuple[Mark, ...]:
    """The marks of both families' rules, in their order, each once. Raises OSError when they cannot be read."""
    found: dict[Mark, None] = {}
    with netlink.Netlink(netlink.ROUTE) as kernel:
        for family in Family:
            for message in _dumped(kernel, family):
                if (mark := mark_kept_out(message)) is not None:
                    found[mark] = None
    return tuple(found)


def mark_kept_out(message: bytes) -> Mark | None:
    """The mark that a rule of the kernel keeps out of a tunnel, if it is of that kind."""
    _, _, _, _, table, _, _, action, flags = _HEADER.unpack_from(message)
    held = netlink.parse(message[_HEADER.size :])
    if action != _FR_ACT_TO_TBL or _FRA_FWMARK not in held or _FRA_IIFNAME in held:
        return None
    table = _number(held.get(_FRA_TABLE), table)
    if not flags & _FIB_RULE_INVERT and table not in (_MAIN, _DEFAULT):
        return None
    mask = _number(held.get(_FRA_FWMASK), MAX_MARK)
    try:
        return Mark(_number(held[_FRA_FWMARK], 0) & mask, mask)
    except ValueError:  # no mark at all
        return None


def _number(packed: bytes | None, otherwise: int) -> int:
    return int(_NUMBER.unpack(packed)[0]) if packed is not None and len(packed) == _NUMBER.size else otherwise

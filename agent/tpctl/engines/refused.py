"""Why the kernel refuses rules, in words that say what to do. The one place where engines' refusals are translated.

What programs print differs from version to version, and one sentence stands for several causes. So nothing is guessed
from it: the kernel is asked again, about what may be the cause (nf_tables by netlink, x_tables by getsockopt(2)).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from tpctl.engines import presence
from tpctl.spec.policy import Family
from tpctl.system import netlink, text
from tpctl.system.errors import HostError

NOT_ALLOWED = (
    "this process may not change the rules of this network namespace: it needs CAP_NET_ADMIN there, which a container "
    "has only if it is started with it (--cap-add NET_ADMIN), and root of a user namespace only in networks of its own"
)
NO_MEMORY = "the kernel has not enough memory for the rules"

_GETCHAIN, _GETGEN = presence.NF_TABLES | 4, presence.NF_TABLES | 16
_TABLE_FLAGS, _TABLE_OWNER = 2, 7
_OWNED = 0x2
"""NFT_TABLE_F_OWNER."""
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_BUILT_IN = {
    "raw": dict.fromkeys(("PREROUTING", "OUTPUT"), ("filter", -300)),
    "mangle": {name: ("route" if name == "OUTPUT" else "filter", -150) for name in _HOOKS},
    "nat": {"PREROUTING": ("nat", -100), "OUTPUT": ("nat", -100), "INPUT": ("nat", 100), "POSTROUTING": ("nat", 100)},
    "filter": dict.fromkeys(("INPUT", "FORWARD", "OUTPUT"), ("filter", 0)),
}
"""Type and priority of the base chains that iptables-nft uses (xtables_ipv4 in iptables/nft.c)."""
_GET_INFO = 64
"""IPT_SO_GET_INFO and IP6T_SO_GET_INFO (linux/netfilter_ipv4/ip_tables.h); struct ipt_getinfo."""
_INFO_BYTES = 84


def cause_in_nf_tables(error: str = "") -> HostError | None:
    """Why nf_tables refuses whatever it is asked for, if it does. `error` is what was printed."""
    match _answer():
        case None:
            return HostError(NO_MEMORY) if os.strerror(errno.ENOMEM) in error else None
        case errno.EPERM | errno.EACCES:
            return HostError(NOT_ALLOWED)
        case errno.ENOMEM | errno.ENOBUFS:
            return HostError(NO_MEMORY)
    return HostError(
        "this kernel has no nf_tables, or may not load it here: run `modprobe -a nf_tables nft_chain_nat`, or use "
        "--engine iptables --iptables-mode legacy"
    )


def cause_in_x_tables(family: Family, tables: Iterable[str]) -> HostError | None:
    """Why the legacy variant cannot use one of these tables, if it cannot."""
    for table in tables:
        match _info(family, table):
            case None:
                continue
            case errno.EPERM | errno.EACCES:
                return HostError(NOT_ALLOWED)
            case errno.ENOENT | errno.ENOPROTOOPT | errno.EPROTONOSUPPORT | errno.EAFNOSUPPORT:
                prefix = "ip" if family is Family.IPV4 else "ip6"
                return HostError(
                    f"this kernel lacks the table {table} of {prefix}tables-legacy, or may not load it here: run "
                    f"`modprobe {prefix}table_{table}`, or use --engine nftables"
                )
            case errno.ENOMEM:
                return HostError(NO_MEMORY)
    return None


def require_own(where: str) -> None:
    """Raise HostError when a table (family and name) belongs to a process that lets nobody else change it (nft(8))."""
    owner = _owner(where)
    if owner is not None:
        raise HostError(
            f"the table {where} of nf_tables belongs to {owner} (flags owner), which alone can change it; end that "
            "program, or let it remove the table"
        )


def require_shareable(family: Family, tables: Iterable[str]) -> None:
    """Raise HostError for a table that iptables-nft cannot use, because somebody has made it with nft otherwise."""
    name = "ip" if family is Family.IPV4 else "ip6"
    wanted = set(tables)
    for table in sorted(wanted):
        require_own(f"{name} {table}")
    for table, chain, kind, hook, priority in _base_chains(name):
        expected = _BUILT_IN.get(table, {}).get(chain)
        if table in wanted and expected and (kind, priority, hook) != (*expected, chain):
            raise HostError(
                f"the table {name} {table} of nf_tables was not made by iptables: its chain {chain} is of type {kind} "
                f"at {hook.lower()}, priority {priority}, and iptables-nft needs {expected[0]} and {expected[1]}; "
                "rename that chain or table, or use --engine nftables, which has a table of its own"
            )


def _answer() -> int | None:
    """The errno with which nf_tables refuses the simplest question; None when it answers."""
    try:
        list(presence.ask(_GETGEN, socket.AF_UNSPEC))
    except OSError as error:
        return error.errno or errno.EINVAL
    return None


def _asked(kind: int, family: str, body: bytes = b"", flags: int = 0) -> Iterator[netlink.Attributes]:
    """What nf_tables answers; nothing when it does not."""
    with contextlib.suppress(OSError):
        yield from (found for _, found in presence.ask(kind, presence.FAMILIES[family], body, flags))


def _owner(where: str) -> str | None:
    family, _, name = where.partition(" ")
    body = netlink.attributes({presence.TABLE_NAME: text.encoded(name) + b"\0"})
    for table in _asked(presence.GETTABLE, family, body):
        if _number(table.get(_TABLE_FLAGS)) & _OWNED:
            return _process(_number(table.get(_TABLE_OWNER)))
    return None


def _process(port: int) -> str:
    """Who a netlink port is: the first that a process opens has the process's id (netlink(7))."""
    try:
        return f"the process {port} ({text.decoded(Path(f'/proc/{port}/comm').read_bytes()).strip()})"
    except OSError:
        return "another process"


def _base_chains(family: str) -> Iterator[tuple[str, str, str, str, int]]:
    """Table, name, type, hook and priority of each."""
    for chain in _asked(_GETCHAIN, family, flags=netlink.DUMP):
        hook = netlink.parse(chain.get(_CHAIN_HOOK, b""))
        number = _number(hook.get(_HOOK_NUMBER), len(_HOOKS))
        if hook and number < len(_HOOKS):
            names = (chain.get(each, b"").rstrip(b"\0") for each in (_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_TYPE))
            table, name, kind = map(text.decoded, names)
            yield table, name, kind, _HOOKS[number], struct.unpack("!i", hook.get(_HOOK_PRIORITY, bytes(4)))[0]


def _number(value: bytes | None, default: int = 0) -> int:
    return int.from_bytes(value, "big") if value else default


def _info(family: Family, table: str) -> int | None:
    """The errno with which x_tables refuses to tell of a table; None when it has it. May load its module."""
    import ctypes

    v4 = family is Family.IPV4
    version, level = (socket.AF_INET, socket.SOL_IP) if v4 else (socket.AF_INET6, socket.IPPROTO_IPV6)
    try:
        with socket.socket(version, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as kernel:
            # Not socket.getsockopt(): the kernel reads the table's name from the buffer.
            said = ctypes.create_string_buffer(text.encoded(table), _INFO_BYTES)
            size = ctypes.c_uint32(_INFO_BYTES)
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.getsockopt(kernel.fileno(), level, _GET_INFO, said, ctypes.byref(size)) != 0:
                return ctypes.get_errno()
    except OSError as error:
        return error.errno or errno.EINVAL
    return None

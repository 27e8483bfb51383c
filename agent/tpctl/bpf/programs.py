"""The eBPF programs of bpf/*.c: where each is attached, and the maps they use."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Scope(enum.Enum):
    """What a program is attached to."""

    APPLICATIONS = "the applications' cgroup"
    DATA_PLANE = "the data plane's cgroup"
    NAMESPACE = "the network namespace"


@dataclass(frozen=True, slots=True)
class Program:
    """A program of bpf/ and its place in the kernel (include/uapi/linux/bpf.h)."""

    name: str
    kind: int
    attach_type: int
    scope: Scope
    since: tuple[int, int] = (5, 8)
    """The first kernel that has its type."""


_SOCK_OPS, _SOCK_ADDR, _SOCKOPT, _SK_LOOKUP = 13, 18, 25, 30

PROGRAMS = (
    Program("getsockopt", _SOCKOPT, 21, Scope.DATA_PLANE),
    Program("sockops", _SOCK_OPS, 3, Scope.DATA_PLANE),
    Program("getpeername4", _SOCK_ADDR, 29, Scope.APPLICATIONS),
    Program("getpeername6", _SOCK_ADDR, 30, Scope.APPLICATIONS),
    Program("recvmsg4", _SOCK_ADDR, 19, Scope.APPLICATIONS),
    Program("recvmsg6", _SOCK_ADDR, 20, Scope.APPLICATIONS),
    Program("sk_lookup", _SK_LOOKUP, 36, Scope.NAMESPACE, (5, 9)),
    Program("connect4", _SOCK_ADDR, 10, Scope.APPLICATIONS),
    Program("connect6", _SOCK_ADDR, 11, Scope.APPLICATIONS),
    Program("sendmsg4", _SOCK_ADDR, 14, Scope.APPLICATIONS),
    Program("sendmsg6", _SOCK_ADDR, 15, Scope.APPLICATIONS),
)
"""In the order they are attached: those that answer for redirected connections before those that redirect."""

KEPT_MAPS = ("asked", "in_flight", "anchor", "listeners")
"""What traffic fills: they outlive a change of policy."""
POLICY_MAPS = ("settings", "ports", "networks", "users", "servers", "marks")
COUNTERS = "counters"
MAPS = (*POLICY_MAPS, COUNTERS, *KEPT_MAPS)
SOCKET_MAPS = ("asked",)
"""Kept with sockets; the kernel wants to be told what they hold (BTF)."""

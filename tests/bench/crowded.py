"""`make bench-scale`, third part: install, status and uninstall on a crowded host, at N and at 2N of something.

Every row has a namespace of its own, and the commands are the real ones. CPU time is theirs and their children's: on a
busy machine only that tells anything. At 2N each should take less than two seconds, and no more than twice what it
takes at N, beyond what it takes with nothing.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable

from tests.bench.install import TPCTL, Cost, keep_bytecode, timed
from tests.netns.lab import bare_namespace, run
from tpctl.host import conntrack
from tpctl.system import netlink

SECONDS = 2.0
GROWTH = 2.5
"""Twice, and what scatters."""
IPTABLES = ("--engine", "iptables", "--iptables-mode", "nft")
NFTABLES = ("--engine", "nftables")
COMMANDS = ("install", "status", "uninstall")
Flags = tuple[str, ...]


def exclusions(count: int) -> Flags:
    """Networks that do not merge, half of them IPv6, in flags of at most some hundred each."""
    networks = [f"10.{number >> 7}.{2 * (number & 127)}.0/24" for number in range(count - count // 2)]
    networks += [f"fd00:{2 * number:x}::/32" for number in range(count // 2)]
    parts = [networks[at : at + 500] for at in range(0, count, 500)]
    return tuple(word for part in parts for word in ("--exclude-outbound-ips", ",".join(part)))


def addresses(count: int) -> Flags:
    """Of one interface, half of them IPv6."""
    lines = [f"address add 10.{number >> 8}.{number & 255}.1/32 dev quiet\n" for number in range(count - count // 2)]
    lines += [f"address add fd00:{number:x}::1/128 dev quiet nodad\n" for number in range(count // 2)]
    run(["ip", "-batch", "-"], stdin="".join(lines))
    return ()


def routes(count: int) -> Flags:
    """To single addresses, none of them leading anywhere."""
    lines = (
        f"route add blackhole 10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32\n" for number in range(count)
    )
    run(["ip", "-batch", "-"], stdin="".join(lines))
    return ()


def connections(count: int) -> Flags:
    """What conntrack remembers of connections that nobody redirects."""
    here, there = socket.inet_aton("192.0.2.1"), socket.inet_aton("192.0.2.2")
    state = {conntrack.PROTOINFO_TCP: {conntrack.PROTOINFO_TCP_STATE: bytes([conntrack.State.ESTABLISHED])}}
    flags = netlink.CREATE | netlink.EXCLUSIVE
    with netlink.Netlink(netlink.NETFILTER) as kernel:
        for number in range(count):
            flow = conntrack.Flow(here, 1024 + number % 60000, there, 443 + number // 60000)
            body = netlink.attributes(
                {
                    conntrack.TUPLE_ORIG: conntrack.told(flow),
                    conntrack.TUPLE_REPLY: conntrack.told(flow.reversed()),
                    conntrack.PROTOINFO: state,
                    conntrack.TIMEOUT: struct.pack("!I", 3600),
                }
            )
            kernel.change(conntrack.NEW, conntrack.head(socket.AF_INET) + body, flags)
    return ()


def foreign_rules(count: int) -> Flags:
    """In a chain that nothing jumps to."""
    rules = "".join(f"-A F -p tcp -m tcp --dport {1 + number % 60000} -j RETURN\n" for number in range(count))
    run(["iptables-nft-restore", "--noflush"], stdin=f"*nat\n:F - [0:0]\n{rules}COMMIT\n")
    return ()


ROWS: tuple[tuple[str, Callable[[int], Flags], int], ...] = (
    ("exclusions", exclusions, 5_000),
    ("addresses", addresses, 1_000),
    ("routes", routes, 50_000),
    ("conntrack entries", connections, 50_000),
    ("foreign rules", foreign_rules, 10_000),
)


def costs(prepare: Callable[[int], Flags], count: int, engine: Flags) -> list[Cost]:
    """Of each command, beside so many."""
    with bare_namespace() as space, space.inside():
        flags = prepare(count)
        return [
            timed([TPCTL, "install", "--kuma-dp-user", "nobody", "--no-probe", *engine, *flags]),
            timed([TPCTL, "status"], codes=(0, 3)),
            timed([TPCTL, "uninstall"]),
        ]


def main() -> int:
    """Run it."""
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    keep_bytecode()
    print(f"{'CPU s (wall s) at N, at 2N':<28}{'N':>8}  " + "".join(f"{command:<38}" for command in COMMANDS))
    for engine in (NFTABLES, IPTABLES):
        base = costs(lambda _: (), 0, engine)
        for what, prepare, count in ROWS:
            once, twice = (costs(prepare, number, engine) for number in (count, 2 * count))
            cells = []
            for nothing, one, two in zip(base, once, twice, strict=True):
                added, more = one.cpu - nothing.cpu, two.cpu - nothing.cpu
                grows = more > 0.1 and more > GROWTH * added
                said = "SLOW" if two.cpu > SECONDS else "GROWS" if grows else "ok"
                cells.append(f"{one.cpu:.2f} ({one.wall:.2f}), {two.cpu:.2f} ({two.wall:.2f}) {said}".ljust(38))
            print(f"{what + ', ' + engine[1]:<28}{count:>8}  " + "".join(cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

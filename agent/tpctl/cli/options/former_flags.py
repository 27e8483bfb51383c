"""Flags that kumactl has, or had in its versions 1 and 2, and tpctl has not: taken for what they mean now, or refused.

They are no options of tpctl's commands, so neither help nor completion shows them; docs/kumactl.md does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tpctl.system.errors import InputError

_NO_EFFECT = "it has no effect here, and can be left out"


class Former(NamedTuple):
    """One of them."""

    flag: str
    takes_value: bool
    becomes: str = ""
    """The flag that means the same; empty when none is needed."""
    prefix: str = ""
    """What that one has before the value."""
    why: str = ""
    """Why none is needed."""
    harmless: tuple[str, ...] | None = None
    """The only values with which none is needed; any other is refused."""
    instead: str = ""
    """What to write where it is refused."""


GLOBAL = (
    Former("--no-config", False, why="tpctl has no configuration of its own"),
    Former("--config-file", True, why="tpctl has no configuration of its own"),
    Former("--api-timeout", True, why="tpctl asks no control plane"),
)
"""Of every command of kumactl."""
INSTALL = (
    *GLOBAL,
    Former("--kuma-dp-uid", True, becomes="--kuma-dp-user"),
    Former("--exclude-outbound-tcp-ports-for-uids", True, "--exclude-outbound-ports-for-uids", "tcp:"),
    Former("--exclude-outbound-udp-ports-for-uids", True, "--exclude-outbound-ports-for-uids", "udp:"),
    Former(
        "--redirect-inbound-port-v6", True, why="IPv6 goes to the same port as IPv4", harmless=("15006", "15010"),
        instead="IPv6 goes to the same port as IPv4: use --redirect-inbound-port, or --ip-family-mode ipv4 where it "
        "was 0",
    ),
    Former(
        "--redirect-dns-upstream-target-chain", True, why="queries that pass reach the rules of other software",
        harmless=("RETURN",),
        instead="queries that pass reach the rules of other software by themselves: leave it out",
    ),
    Former("--skip-resolv-conf", False, why="resolv.conf is never written"),
    Former("--kuma-cp-ip", True, why="no control plane answers DNS queries any more"),
    Former("--use-transparent-proxy-engine-v1", False, why="tpctl has engines of its own, see --engine"),
)  # fmt: skip
UNINSTALL = (
    *GLOBAL,
    Former("--ebpf-enabled", False, why="uninstall looks for every engine's work"),
    Former("--ebpf-bpffs-path", True, why="uninstall looks for every engine's work"),
)


def translated(args: Sequence[str], known: Sequence[Former]) -> tuple[list[str], list[str]]:
    """Arguments without former flags, and notices about those. Raises InputError for one that is refused."""
    by_flag: Mapping[str, Former] = {former.flag: former for former in known}
    kept, notices = list[str](), list[str]()
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            kept += [word, *rest]
            break
        flag, equals, value = word.partition("=")
        former = by_flag.get(flag)
        if former is None:
            kept.append(word)
            continue
        if former.takes_value and not equals:
            if not rest:
                raise InputError(f"flag {flag}: it needs a value")
            value = rest.pop(0)
        replacement, notice = _translated(former, value)
        kept += replacement
        notices.append(notice)
    return kept, notices


def _translated(former: Former, value: str) -> tuple[list[str], str]:
    if former.becomes:
        new = [f"{former.becomes}={former.prefix}{one}" for one in (_by_uid(value) if former.prefix else [value])]
        return new, f"{former.flag} is taken as {' '.join(new)}"
    if former.harmless is not None and value not in former.harmless:
        raise InputError(f"flag {former.flag}: {former.instead}")
    return [], f"{former.flag}: {former.why}; {_NO_EFFECT}"


def _by_uid(value: str) -> list[str]:
    """`ports:uids` with one uid, or range of uids, each: these flags took lists of them."""
    ports, colon, uids = value.partition(":")
    return [f"{ports}:{uid}" for uid in uids.split(",")] if colon else [value]

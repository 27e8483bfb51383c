"""Losing ssh to a host is the classic accident of a first install: how tpctl prevents it, and warns. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from tpctl.spec.policy import Inbound, PortRange, Ports, includes

SSH_PORT = 22


class Guarded(NamedTuple):
    """Inbound redirection that leaves the caller's own session alone."""

    inbound: Inbound
    notices: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def guard(inbound: Inbound, session: int | None, listening: Iterable[int], *, enabled: bool) -> Guarded:
    """Exclude the port of the caller's ssh session, if there is one; warn about other ssh ports that are captured.

    `listening` are the ports on which other hosts reach an sshd. Not `enabled` means that the operator declined.
    """
    if not inbound.enabled:
        return Guarded(inbound)
    notices: list[str] = []
    if session is not None and enabled and captures(inbound, session):
        spared = without(inbound, session)
        if spared is None:
            return Guarded(inbound, problems=(_only_this(session),))
        inbound = spared
        notices.append(
            f"warning: this ssh session uses port {session}, so inbound port {session} is not redirected; "
            f"add --exclude-inbound-ports {session} to the configuration to keep it that way, because an install that "
            "is not run over ssh redirects it; --no-ssh-guard redirects it now"
        )
    declined = {session} if session is not None and not enabled else set()
    ports = {*listening, *declined}
    notices += [_warning(inbound, port) for port in sorted(ports) if captures(inbound, port)]
    return Guarded(inbound, tuple(notices))


def captures(inbound: Inbound, port: int) -> bool:
    """Whether new connections to a port go to the data plane."""
    if not inbound.enabled:
        return False
    return includes(inbound.include_ports, port) if inbound.include_ports else not includes(inbound.exclude_ports, port)


def without(inbound: Inbound, port: int) -> Inbound | None:
    """The same with one port left alone; None when nothing would be left of the included ports."""
    if not inbound.include_ports:
        return dataclasses.replace(inbound, exclude_ports=(*inbound.exclude_ports, PortRange(port)))
    left = _less(inbound.include_ports, port)
    return dataclasses.replace(inbound, include_ports=left) if left else None


def _less(ports: Ports, port: int) -> Ports:
    left: list[PortRange] = []
    for one in ports:
        if one.first <= port <= one.last:
            left += [PortRange(one.first, port - 1)] if one.first < port else []
            left += [PortRange(port + 1, one.last)] if port < one.last else []
        else:
            left.append(one)
    return tuple(left)


def _only_this(port: int) -> str:
    return (
        f"--include-inbound-ports lists only port {port}, which this ssh session uses: new sessions would go to "
        "the data plane; include other ports, or give --no-ssh-guard to redirect it anyway"
    )


def _warning(inbound: Inbound, port: int) -> str:
    way_out = (
        "leave it out of --include-inbound-ports to keep them direct"
        if inbound.include_ports
        else f"--exclude-inbound-ports {port} keeps them direct"
    )
    return (
        f"warning: new ssh connections (port {port}) will go to the data plane, and fail when it does not let them "
        f"through; {way_out}"
    )

"""The neighbours: what each needs, and how it is started and restarted on a host, as shell scripts for a room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SERVED = 8080
"""A port that a service of the host's listens on, and that every firewall here has been told to let in."""
PUBLISHED = 8088
"""A port that a container is reached by."""


@dataclass(frozen=True)
class Outgoing:
    """A connection of this host's that the neighbour has something to do with."""

    destination: str
    port: int = 443
    source: str | None = None
    """If it is not the host's usual one."""


@dataclass(frozen=True)
class Neighbour:
    """Software that keeps rules of its own."""

    name: str
    owner: str
    """As tpctl calls whoever made its rules."""
    start: str
    restart: str
    needs: tuple[str, ...] = ()
    """Programs."""
    published: tuple[int, ...] = ()
    """The families, 4 and 6, of which it translates connections to the port `PUBLISHED` to a container's address."""
    is_near: bool = False
    """Whether only clients of the host's own link can reach it, with or without tpctl."""
    outgoing: tuple[Outgoing, ...] = ()
    variants: tuple[str, ...] = ("nft", "legacy")
    """Of iptables, which it uses."""
    meant: Mapping[str, str] = field(default_factory=dict)
    """Advice in words that are no command, and the command that does it."""

"""What a relay is running: its settings, the sockets that serve them, and the places of its counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tpctl.relay.connections.socket_options import keep_alive
from tpctl.relay.process.sockets import Sockets, deal, open_sockets, wanted
from tpctl.relay.settings.check import MAX_LISTENERS
from tpctl.relay.settings.listen import Keepalive, show
from tpctl.relay.settings.model import Acceleration, ListenerSettings, Role, Settings
from tpctl.system.errors import InputError

_RESTART = "takes effect with a restart (signal SIGUSR2)"
_ANEW = "takes effect when the relay is stopped and started again"


@dataclass(frozen=True, slots=True)
class Running:
    """The present state; a reload makes another one of it."""

    settings: Settings
    sockets: Sockets
    slots: Mapping[str, int] = field(default_factory=dict)
    """Of the counters of each listener, by its name. Names that have gone keep theirs."""

    @classmethod
    def begin(cls, settings: Settings, held: Sockets) -> Running:
        """From nothing but sockets that somebody else has opened. Raises HostError when another cannot be opened."""
        return cls(settings, open_sockets(settings, held)[0], _slots({}, settings))

    def renewed(self, settings: Settings, left_soon: frozenset[int] = frozenset()) -> tuple[Running, Sockets]:
        """The state with other settings, and its sockets that are new; see `open_sockets` for `left_soon`.

        Raises InputError when that takes a restart, HostError when a socket cannot be opened; then nothing has changed.
        """
        problems = list(needs_restart(self.settings, settings))
        slots = _slots(self.slots, settings)
        if len(slots) > MAX_LISTENERS:
            problems.append(f"listeners: more than {MAX_LISTENERS} names since the start; another one {_RESTART}")
        if problems:
            raise InputError(problems)
        sockets, _new = open_sockets(settings, self.sockets, left_soon)
        self._forget_keepalive(settings)
        added = {place: sockets[place] for place in sockets.keys() - self.sockets.keys()}
        return Running(settings, sockets, slots), added

    def _forget_keepalive(self, settings: Settings) -> None:
        """Without so_keepalive a socket keeps what it has, unless that is from the settings before."""
        listens = {place: listener.listen for listener, place in wanted(self.settings)}
        for listener, place in wanted(settings):
            if place in listens and listens[place].keepalive is not None and listener.listen.keepalive is None:
                for sock in self.sockets[place]:
                    keep_alive(sock, Keepalive(False))

    def share(self, worker: int) -> Sockets:
        """The sockets of one worker."""
        return {place: deal(sockets, worker, self.settings.workers) for place, sockets in self.sockets.items()}


def needs_restart(old: Settings, new: Settings) -> Iterator[str]:
    """What differs and cannot be changed in a running process or on an open socket, which a successor gets as well."""
    to_sockmap = new.accelerate is Acceleration.SOCKMAP
    for name, way in (("workers", _RESTART), ("user", _ANEW), ("accelerate", _ANEW if to_sockmap else _RESTART)):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield f"{name}: the change from {before} to {after} {way}"
    served = {show(listener.listen.address): listener for listener in old.served}
    for listener in new.served:
        known = served.get(show(listener.listen.address))
        if known is None:
            continue
        where = f"listener {listener.name}: "
        for option, way in (("transparent", _RESTART), ("ipv6only", _ANEW), ("reuseport", _ANEW)):
            if getattr(known.listen, option) != getattr(listener.listen, option):
                yield f"{where}{option} of {show(known.listen.address)} has changed, which {way}"
        if _kind(known) != _kind(listener):
            what = f"{show(known.listen.address)} serves {_kind(known)}, and {_kind(listener)} instead"
            yield f"{where}{what}: that {_RESTART}"


def _kind(listener: ListenerSettings) -> str:
    """Who in a worker serves it: a socket stays with them."""
    return "connections" if listener.role in (Role.INBOUND, Role.OUTBOUND) else str(listener.role)


def _slots(known: Mapping[str, int], settings: Settings) -> dict[str, int]:
    slots = dict(known)
    for listener in settings.listeners:
        slots.setdefault(listener.name, len(slots))
    return slots

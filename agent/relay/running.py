"""What a relay is running: its settings, the sockets that serve them, and the places of its counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from agent.errors import InputError
from agent.relay.check import MAX_LISTENERS
from agent.relay.listen import show
from agent.relay.settings import Settings
from agent.relay.sockets import Sockets, deal, open_sockets

_RESTART = "takes effect with a restart (signal SIGUSR2)"


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

    def renewed(self, settings: Settings) -> tuple[Running, Sockets]:
        """The state with other settings, and its sockets that are new.

        Raises InputError when that takes a restart, HostError when a socket cannot be opened; then nothing has changed.
        """
        problems = list(needs_restart(self.settings, settings))
        slots = _slots(self.slots, settings)
        if len(slots) > MAX_LISTENERS:
            problems.append(f"listeners: more than {MAX_LISTENERS} names since the start; another one {_RESTART}")
        if problems:
            raise InputError(problems)
        sockets, _new = open_sockets(settings, self.sockets)
        added = {place: sockets[place] for place in sockets.keys() - self.sockets.keys()}
        return Running(settings, sockets, slots), added

    def share(self, worker: int) -> Sockets:
        """The sockets of one worker."""
        return {place: deal(sockets, worker, self.settings.workers) for place, sockets in self.sockets.items()}


def needs_restart(old: Settings, new: Settings) -> Iterator[str]:
    """What differs and cannot be changed in a running process or on an open socket."""
    for name in ("workers", "user", "accelerate"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield f"{name}: the change from {before} to {after} {_RESTART}"
    listens = {show(listener.listen.address): listener.listen for listener in old.served}
    for listener in new.served:
        before = listens.get(show(listener.listen.address))
        for option in ("transparent", "ipv6only", "reuseport"):
            if before is not None and getattr(before, option) != getattr(listener.listen, option):
                yield f"listener {listener.name}: {option} of {show(before.address)} has changed, which {_RESTART}"


def _slots(known: Mapping[str, int], settings: Settings) -> dict[str, int]:
    slots = dict(known)
    for listener in settings.listeners:
        slots.setdefault(listener.name, len(slots))
    return slots

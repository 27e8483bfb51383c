"""The local zone as it is in use: answers from it, and follows its file."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tpctl.relay.dns.counters import DnsCounters
from tpctl.relay.dns.message import Question, Rcode, failure
from tpctl.relay.dns.vips import Vips
from tpctl.relay.dns.zone import UDP_PAYLOAD_WITHOUT_EDNS, Zone
from tpctl.relay.loop.loop import EXHAUSTED, Loop, Timer
from tpctl.relay.settings.dns import DnsSettings
from tpctl.system.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

Signature = tuple[int, int, int]
"""What changes with a file: its inode, modification time and size."""
_UNREAD: Signature = (-1, -1, -1)
RECHECK_SECONDS = 1.0
SETTLED_SECONDS = 0.2
"""A file that was written more recently may not be complete yet."""
_MAX_CACHED = 4096
_MAX_CACHED_QUERY = 300
"""The longest name, and EDNS without options; so the answers that are kept fill 4 MB at most."""


def read_zone(settings: DnsSettings) -> Zone | None:
    """The zone of the settings' file, None without one. Raises InputError with every problem."""
    if settings.zone_file is None:
        return None
    from tpctl.relay.dns.zone_file import read_zone_file  # lazily: dnspython and YAML, 60 ms

    zone = read_zone_file(settings.zone_file, settings.zone)
    zone.rehearse()
    return zone


class LocalZone:
    """The zone of a file that may change while the relay runs. An unusable file is logged; the last zone stays.

    Unusable from the beginning, as it may have become before a worker is replaced, its names are answered by SERVFAIL
    until it is in order. `read_zone` says so before there is a worker.
    """

    def __init__(
        self,
        settings: DnsSettings,
        loop: Loop,
        counters: DnsCounters,
        log: FilteringBoundLogger,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._counters = counters
        self._log = log
        self._clock = clock
        self._seen: Signature | None = self._signature()
        self._zone: Zone | None = None
        self._coming: Zone | None = None
        """Of which only the origin is known yet: its names are not for the name servers either."""
        self._answers: dict[bytes, bytes] = {}
        """Answers by the query, both without the id. To build one takes dnspython a fifth of a millisecond."""
        self._reader: threading.Thread | None = None
        self._read: tuple[DnsSettings, Zone | InputError] | None = None
        self._timer: Timer | None = None
        try:
            self._zone = read_zone(settings)
        except InputError as error:
            self._await_names()
            self._log.error("the DNS zone file is unusable, its names are not answered", problems=list(error.problems))
            if _is_for_want_of_room(error):
                self._seen = _UNREAD
        self._watch()

    def use(self, settings: DnsSettings) -> None:
        """Follow another file from now on; the present zone stays until that has been read."""
        if settings != self._settings:
            self._settings = settings
            self._seen = _UNREAD
            self._coming = None
            if settings.zone_file is None:
                self._zone = None
                self._answers = {}
            else:
                self._await_names()
                self.refresh()
            self._watch()

    def _await_names(self) -> None:
        from tpctl.relay.dns.zone_file import wire_name  # lazily: dnspython

        self._coming = Zone(wire_name(self._settings.zone), {})

    @property
    def vips(self) -> Vips:
        """The virtual addresses of the zone."""
        return self._zone.vips if self._zone is not None else Vips()

    def remembered(self, rest: bytes) -> bytes | None:
        """The answer to a query, both without their ids, if it was given before."""
        known = self._answers.get(rest)
        if known is not None:
            self._counters.local += 1
        return known

    def answer(self, query: bytes, question: Question, udp: bool) -> bytes | None:
        """The answer to a query for a name of the zone; None for all others, which are for the name servers."""
        zone = self._zone
        if zone is None or not zone.covers(question.name):
            if self._coming is not None and self._coming.covers(question.name):
                return failure(query, Rcode.SERVFAIL, question)
            return None
        rest = query[2:]
        known = self.remembered(rest)
        if known is not None:
            return query[:2] + known
        self._counters.local += 1
        try:
            answer = zone.answer(query, question, udp=udp)
        except OSError:  # dnspython imports the kinds of records when it meets them, and there are no descriptors left
            return failure(query, Rcode.SERVFAIL, question)
        if len(query) <= _MAX_CACHED_QUERY and _is_lasting(answer):
            if len(self._answers) >= _MAX_CACHED:
                self._answers.clear()
            self._answers[rest] = answer[2:]
        return answer

    def refresh(self) -> None:
        """Look after the file: begin to read it when it has changed, use it when it has been read."""
        if self._reader is None:
            signature = self._signature()
            if signature != self._seen and self._is_settled(signature):
                self._seen = signature
                # In a thread: 10 000 names of YAML take 3 s, for which no connection should stand still.
                self._reader = threading.Thread(target=self._reread, args=(self._settings,), name="zone", daemon=True)
                self._reader.start()
        elif not self._reader.is_alive():
            self._reader = None
            if self._read is not None and self._read[0] == self._settings:
                self._take(self._read[1])

    def _watch(self) -> None:
        """Look after the file every now and then, as long as there is one."""
        if self._timer is None and self._path is not None:
            self._timer = self._loop.later(RECHECK_SECONDS, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._watch()
        self.refresh()

    def _take(self, read: Zone | InputError) -> None:
        if isinstance(read, Zone):
            self._zone = read
            self._coming = None
            self._answers = {}
            self._counters.reloads += 1
            self._log.info("the DNS zone has been reloaded", file=str(self._path), names=len(read.names))
        else:
            self._counters.rejected_reloads += 1
            self._log.warning("the DNS zone file is unusable; the previous one stays", problems=list(read.problems))

    def _reread(self, settings: DnsSettings) -> None:
        self._read = None
        try:
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            zone = read_zone(settings)
        except InputError as error:
            if _is_for_want_of_room(error):
                self._seen = _UNREAD
            else:
                self._read = (settings, error)
        except OSError:  # there is no room for another descriptor: later, then
            self._seen = _UNREAD
        else:
            self._read = (settings, zone) if zone is not None else None

    @property
    def _path(self) -> Path | None:
        return self._settings.zone_file

    def _signature(self) -> Signature | None:
        """The file's; None while there is none."""
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return (status.st_ino, status.st_mtime_ns, status.st_size)

    def _is_settled(self, signature: Signature | None) -> bool:
        return signature is None or not 0 <= self._clock() - signature[1] / 1e9 < SETTLED_SECONDS


def _is_for_want_of_room(error: BaseException | None) -> bool:
    """Whether a file could not be read for want of descriptors or memory, and may be in order."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and error.errno in EXHAUSTED


def _is_lasting(answer: bytes) -> bool:
    """Whether the same query gets the same answer again, over UDP and over TCP.

    Several addresses come in another order each time, and a long answer may be truncated over UDP.
    """
    truncated = answer[2] & 0x02
    return answer[6:8] <= b"\0\1" and len(answer) <= UDP_PAYLOAD_WITHOUT_EDNS and not truncated

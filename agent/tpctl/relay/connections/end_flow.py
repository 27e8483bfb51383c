"""One direction of a connection with TLS on either side: the counterpart of `tpctl.relay.connections.pump.Flow`."""

from __future__ import annotations

from tpctl.relay.connections.ends import End
from tpctl.relay.connections.pump import DONE, READ, WRITE

_ROUNDS = 16
"""Reads an event, so that one fast stream does not starve the others."""


class EndFlow:
    """Moves bytes from one end to the other."""

    __slots__ = ("_ended", "_sink", "_source", "moved", "wish")

    def __init__(self, source: End, sink: End) -> None:
        self._source = source
        self._sink = sink
        self._ended = False
        self.moved = 0
        """Bytes that were passed on, as the application sees them."""
        self.wish = READ

    def move(self) -> bool:
        """Pass on what can be passed on now, and update `wish`. Raises OSError when either end is broken.

        Returns False, that is, `wish` has to be looked at, whatever became of it.
        """
        for _ in range(_ROUNDS):
            if self.wish is DONE:
                return False
            if not self._sink.flush():
                self.wish = WRITE
                return False
            if self._ended:
                self.wish = DONE
                return False
            data = self._source.read()
            if data is None:
                self.wish = READ
                return False
            if data:
                self._sink.write(data)
                self.moved += len(data)
            else:
                self._sink.close()
                self._ended = True
        # There may be more, of which epoll knows nothing because OpenSSL has it already. The sink can be written, so
        # that waiting for that comes back at once.
        self.wish = WRITE
        return False

    def is_chatty(self) -> bool:
        """No: what OpenSSL encrypts has to come through this process."""
        return False

    def abandon(self) -> None:
        """Nothing more will be moved, because the connection is over."""
        self.wish = DONE

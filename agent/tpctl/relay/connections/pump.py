"""Moves bytes from one socket to another: the hot path.

Small messages are copied through one shared buffer. Once a read fills that buffer, the stream is spliced through a
pipe instead, so that its bytes never enter this process (splice(2)).
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import socket

from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.descriptors import SPARE, unlimited
from tpctl.relay.loop.shares import Shares

BUFFER_SIZE = 64 * 1024
PIPE_SIZE = 1024 * 1024
"""The most that an unprivileged user may ask for (/proc/sys/fs/pipe-max-size)."""
MAX_PIPES = 256
"""In use and idle. A connection that gets none copies through the buffer."""
_ENDS = 2
_PART = 16
_AT_ONCE = socket.MSG_DONTWAIT
"""Of a socket that would wait: that makes it one that does not, without a call of its own."""
_ROUNDS = 8
"""Splices an event, so that one fast stream does not starve the others."""
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Pipe:
    """A pipe that is empty whenever nobody holds it."""

    __slots__ = ("sink", "size", "source")

    def __init__(self) -> None:
        self.source, self.sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.size = fcntl.fcntl(self.sink, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:  # the user's share of pipe memory is used up (pipe(7)): the default size works as well
            self.size = fcntl.fcntl(self.sink, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        """Give its memory back, with whatever it holds."""
        os.close(self.source)
        os.close(self.sink)


class PipePool:
    """Pipes, made when first needed and kept: two for every connection would cost a quarter of the connection rate."""

    def __init__(self, limit: int = MAX_PIPES, descriptors: Shares | None = None) -> None:
        """`descriptors` that others need as well; they have a sixteenth of them at most."""
        self._descriptors = descriptors or unlimited()
        self._limit = min(limit, self._descriptors.total // _PART)
        self._made = 0
        self._idle: list[Pipe] = []

    def take(self) -> Pipe | None:
        """An empty pipe, or None when there are enough of them or descriptors have run out."""
        if self._idle:
            return self._idle.pop()
        if self._made >= self._limit or not self._descriptors.take(SPARE, _ENDS):
            return None
        try:
            pipe = Pipe()
        except OSError:
            self._descriptors.give(SPARE, _ENDS)
            return None
        self._made += 1
        return pipe

    def give(self, pipe: Pipe) -> None:
        """Return a pipe that is empty."""
        self._idle.append(pipe)

    def discard(self, pipe: Pipe) -> None:
        """Return a pipe that may still hold bytes of a broken stream."""
        self._made -= 1
        pipe.close()
        self._descriptors.give(SPARE, _ENDS)

    def close(self) -> None:
        """Close the idle pipes."""
        while self._idle:
            self.discard(self._idle.pop())


class Wish(enum.IntEnum):
    """What a flow waits for."""

    READ = 1
    """Its source to have something."""
    WRITE = 2
    """Its sink to take something; until then it reads nothing, so it never holds more than one buffer or pipe."""
    DONE = 3
    """Nothing: the end of the stream has been passed on."""
    END = 4
    """Its source to end: the kernel moves the bytes (`tpctl.relay.connections.acceleration`)."""
    SENT = 5
    """The kernel to have sent what it has moved; nothing tells when, so it looks now and then."""


READ, WRITE, DONE, END, SENT = Wish


def end_stream(sock: Socket) -> None:
    """Send the end of a stream to a peer, unless that has gone: whether it was still needed is found out elsewhere."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise


class Flow:
    """One direction of a connection."""

    __slots__ = (
        "_buffer",
        "_held",
        "_in_pipe",
        "_pipe",
        "_pool",
        "is_bulk",
        "is_last",
        "moved",
        "sink",
        "source",
        "wish",
    )

    def __init__(self, source: Socket, sink: Socket, buffer: memoryview, pool: PipePool) -> None:
        self.source = source
        self.sink = sink
        self._buffer = buffer
        self._pool = pool
        self._pipe: Pipe | None = None
        self._in_pipe = 0
        self._held = b""
        self.is_bulk = False
        """Whether a read has filled the buffer: the next one splices, and neither socket may be one that waits."""
        self.is_last = False
        """Whether the other direction has ended: then so does the connection with this one, and closing tells it."""
        self.moved = 0
        """Bytes that were passed on."""
        self.wish = READ

    def move(self) -> bool:
        """Pass on what can be passed on now, and update `wish`. Raises OSError when either end is broken.

        Returns whether `wish` was, and still is, READ, and no bulk has begun: so it is for nearly every event, and
        nobody has to look further.
        """
        # A small message takes this one call: every further one would cost a twentieth of the rate of requests.
        if self.is_bulk or self.wish is not READ:
            return self._move_otherwise()
        buffer = self._buffer
        try:
            count = self.source.recv_into(buffer, 0, _AT_ONCE)
        except BlockingIOError:
            return True
        if not count:
            self._end()
            return False
        try:
            sent = self.sink.send(buffer[:count], _AT_ONCE)
        except BlockingIOError:
            sent = 0
        self.moved += sent
        self.is_bulk = count == BUFFER_SIZE
        if sent == count:
            return not self.is_bulk
        self._held = bytes(buffer[sent:count])
        self.wish = WRITE
        return False

    def _move_otherwise(self) -> bool:
        """What is not a small message: what is held, a stream, or nothing any more."""
        before = self.wish
        if before is DONE or (before is WRITE and not self._flush()):
            return False
        self.wish = READ
        if self.is_bulk:
            self._splice()
        else:
            self.move()
        return before is READ and self.wish is READ

    def is_chatty(self) -> bool:
        """Whether it would do better without this process."""
        return False

    def abandon(self) -> None:
        """Drop what is held, because the connection is over."""
        self.wish = DONE
        self._held = b""
        if self._pipe is not None:
            self._pool.discard(self._pipe)
            self._pipe = None

    def _flush(self) -> bool:
        """Whether nothing is held any more."""
        try:
            if self._pipe is not None:
                if not self._drain(self._pipe):
                    return False
                self._pool.give(self._pipe)
                self._pipe = None
                return True
            sent = self.sink.send(self._held, _AT_ONCE)
        except BlockingIOError:
            return False
        self.moved += sent
        self._held = self._held[sent:]
        return not self._held

    def _splice(self) -> None:
        pipe = self._pool.take()
        if pipe is None:
            self.is_bulk = False
            self.move()
            return
        # Held from here on, so that `abandon` finds the pipe when a splice fails half-way.
        self._pipe = pipe
        source, total = self.source.fileno(), 0
        for _ in range(_ROUNDS):
            try:
                self._in_pipe = os.splice(source, pipe.sink, pipe.size, flags=_FLAGS)
            except BlockingIOError:
                break
            if not self._in_pipe:
                # The end; or urgent data, at whose mark splice() stops for good once the end has come behind it.
                self._release()
                self.is_bulk = False
                self.move()
                return
            total += self._in_pipe
            if not self._drain(pipe):
                self.wish = WRITE
                return
        self.is_bulk = total >= BUFFER_SIZE
        self._release()

    def _release(self) -> None:
        assert self._pipe is not None
        self._pool.give(self._pipe)
        self._pipe = None

    def _drain(self, pipe: Pipe) -> bool:
        """Whether the pipe is empty."""
        sink = self.sink.fileno()
        while self._in_pipe:
            try:
                count = os.splice(pipe.source, sink, self._in_pipe, flags=_FLAGS)
            except BlockingIOError:
                return False
            self._in_pipe -= count
            self.moved += count
        return True

    def _end(self) -> None:
        """The source has ended: so does the sink, in this direction only."""
        self.wish = DONE
        if not self.is_last:
            end_stream(self.sink)

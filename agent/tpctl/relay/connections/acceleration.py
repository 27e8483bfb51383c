"""Leaves the bytes of chatty connections to the kernel (`sockmap`); takes back those that are too many.

Each direction goes over by itself, and only when nothing of it is held here:

- Its sink is put into `targets` first, then its source into `sources`. From then on the kernel redirects what the
  source receives; nobody reads it here. What had come before waits in the source and is redirected first: setting
  SO_RCVLOWAT makes the kernel look at it again (tcp_set_rcvlowat(), net/ipv4/tcp.c).
- The end of the source is seen here. It is passed on when all that was redirected has been written to the sink: a
  kernel worker does that later, and would find the sink closed.
- When too much waits for the sink, the program leaves the rest of the source to this process, for good. Once the
  sink has all that was redirected before, the rest is copied. It is not spliced: splice() does not know of it.
- Taking a source out of `sources` while bytes arrive would lose some: the kernel drops what it is just handing to a
  program that has gone (sk_psock_verdict_recv(), net/core/skmsg.c). So it stays there until it is closed.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from tpctl.bpf import syscall
from tpctl.relay.connections.pump import DONE, END, READ, SENT, Flow, PipePool
from tpctl.relay.connections.sockmap import Sockmap
from tpctl.relay.loop.bare_socket import Socket
from tpctl.relay.loop.loop import Loop

ENOUGH = 64
"""Small messages in a row, in each direction, after which a connection is chatty. Going over takes some 20 system
calls, as many as ten messages do."""
SMALL = 16 * 1024
"""Bytes read at a time. Large messages do better spliced."""
_LOOK_SECONDS = 0.05
"""How long a stream that is over may wait until it is noticed."""
_FIRST_PATIENCE, _LAST_PATIENCE = 0.001, 1.0
_NO_PIPES = PipePool(0)
_STREAM = struct.Struct("=QQ8x")
_BROKEN = 2
"""struct stream and what its member `end` may be in bpf/relay_sockmap.c."""
_KEY_SIZE = 8
_FOREVER = 1 << 62

_SO_COOKIE = 57
_SIOCOUTQ = 0x5411
_SIOCINQ = 0x541B
_INFO = struct.Struct("=B119xQQ")
"""linux/tcp.h, struct tcp_info: as in `_Info`."""
_ESTABLISHED, _CLOSE = 1, 7
_HAS_ENDED = (6, _CLOSE, 8, 9, 11)
"""net/tcp_states.h: TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING."""


class ChattyFlow(Flow):
    """A flow that counts its small messages."""

    __slots__ = ("_small",)

    def __init__(self, source: Socket, sink: Socket, buffer: memoryview, pool: PipePool) -> None:
        super().__init__(source, sink, buffer, pool)
        self._small = 0

    def move(self) -> bool:
        """See `Flow`. False as well when it has become chatty, so that somebody looks."""
        before = self.moved
        is_quiet = super().move()
        if not is_quiet or self.moved - before > SMALL:
            self._small = min(self._small, 0)
            return is_quiet
        self._small += 1
        return self._small % ENOUGH != 0

    def is_chatty(self) -> bool:
        """See `Flow`."""
        return self._small >= ENOUGH and self.wish is READ

    def stay(self) -> None:
        """Never be chatty."""
        self._small = -_FOREVER


class Accelerator:
    """The accelerated connections of a worker."""

    def __init__(self, loop: Loop, maps: Sockmap, buffer: memoryview) -> None:
        self.loop = loop
        self.maps = maps
        self.buffer = buffer
        self.begun = 0
        """Directions that went over to the kernel so far."""
        self.over = 0
        """Those of them that were taken back."""
        self._flows: dict[bytes, RedirectedFlow] = {}
        self._is_looking = False

    def take_over(self, up: Flow, down: Flow, nudge: Callable[[], None]) -> Flows | None:
        """Let the kernel move the bytes of a connection, as far as it can; None when it cannot at all.

        `nudge` is called when something has to be done about it again.
        """
        found: list[RedirectedFlow] = []
        try:
            for flow in (up, down):
                found.append(RedirectedFlow(self, flow, nudge))
                found[-1].prepare()
        except OSError:  # it ends just now, is not TCP, or there is no room
            for redirected in found:
                redirected.forget()
            return None
        return self._begin(found[0], up), self._begin(found[1], down)

    def _begin(self, redirected: RedirectedFlow, flow: Flow) -> Flow | RedirectedFlow:
        try:
            redirected.begin()
        except OSError:  # it has ended meanwhile: its bytes go on as before, in this direction
            redirected.forget()
            return flow
        self.begun += 1
        self._flows[redirected.key] = redirected
        if not self._is_looking:
            self._is_looking = True
            self.loop.later(_LOOK_SECONDS, self._look)
        return redirected

    def leave(self, redirected: RedirectedFlow) -> None:
        """Its connection is over."""
        self._flows.pop(redirected.key, None)

    def _look(self) -> None:
        """See to streams that are over: one system call while there is none, however many connections there are."""
        self._is_looking = bool(self._flows)
        if not self._is_looking:
            return
        self.loop.later(_LOOK_SECONDS, self._look)
        for key in list(syscall.keys(self.maps.ended, _KEY_SIZE)):
            redirected = self._flows.get(key)  # that of another worker, perhaps
            if redirected is not None:
                syscall.delete(self.maps.ended, key)
                self.loop.attempt(redirected.nudge)


class _Moved(NamedTuple):
    """What the program says of a stream."""

    redirected: int
    end: int
    """Not 0 when it redirects no more."""


class _Info(NamedTuple):
    """What the kernel says of a socket."""

    state: int
    acked: int
    """Bytes that its peer has acknowledged."""
    received: int
    """Bytes that have come in order, the FIN counted as one."""

    @classmethod
    def of(cls, sock: Socket) -> _Info:
        """Raises OSError."""
        return cls(*_INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)))


def _queued(sock: Socket, request: int) -> int:
    """Bytes that have come and were not read, or were written and are not acknowledged."""
    raw: bytes = fcntl.ioctl(sock, request, bytes(4))
    return int.from_bytes(raw, "little")


class _RestFlow(Flow):
    """A flow that was redirected before.

    The kernel reports the end of its source too early: when that has come, and the bytes before it wait for room among
    those that can be read (tcp_bpf_recvmsg_parser(), net/ipv4/tcp_bpf.c). So they are counted.
    """

    __slots__ = ("_read_before",)

    def __init__(self, flow: RedirectedFlow, buffer: memoryview, read_before: int) -> None:
        super().__init__(flow.source, flow.sink, buffer, _NO_PIPES)
        self._read_before = read_before

    def _end(self) -> None:
        if self._read_before + self.moved < _Info.of(self.source).received - 1:
            self.wish = SENT
        else:
            super()._end()


class Stage(enum.Enum):
    """Who moves the bytes of a flow that went over to the kernel; it only goes forward."""

    REDIRECTED = enum.auto()
    """The kernel, until the source ends or too much waits for the sink."""
    COPYING = enum.auto()
    """This process again: too much waited."""
    OVER = enum.auto()
    """Nobody: the sink has everything, or the connection has ended."""


class RedirectedFlow:
    """One direction of a connection that the kernel moves: the counterpart of `tpctl.relay.connections.pump.Flow`."""

    __slots__ = ("_accelerator", "_before", "_copying", "_final", "_is_waiting", "_patience", "_read_before",
                 "_sent_before", "key", "nudge", "sink", "source", "stage", "wish")  # fmt: skip

    def __init__(self, accelerator: Accelerator, flow: Flow, nudge: Callable[[], None]) -> None:
        self._accelerator = accelerator
        self.source = flow.source
        self.sink = flow.sink
        self._before = flow.moved
        self.key = flow.source.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _KEY_SIZE)
        self.nudge = nudge
        self._read_before = 0
        self._sent_before = 0
        self._copying: _RestFlow | None = None
        self._final: int | None = None
        """Bytes that were redirected, once no more will be."""
        self._is_waiting = False
        self._patience = _FIRST_PATIENCE
        self.wish = END
        self.stage = Stage.REDIRECTED

    def prepare(self) -> None:
        """Everything but the redirection. Raises OSError."""
        received, acked = -1, -1
        while (info := _Info.of(self.source)).received != received:  # until nothing has come between the two calls
            received = info.received
            self._read_before = received - _queued(self.source, _SIOCINQ)
        if info.state != _ESTABLISHED:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        while (info := _Info.of(self.sink)).acked != acked:
            acked = info.acked
            self._sent_before = acked + _queued(self.sink, _SIOCOUTQ)
        maps = self._accelerator.maps
        syscall.update(maps.streams, self.key, _STREAM.pack(0, 0))
        syscall.update(maps.targets, self.key, struct.pack("=i", self.sink.fileno()))

    def begin(self) -> None:
        """Redirect what the source receives, and what it has received. Raises OSError, when nothing has changed."""
        syscall.update(self._accelerator.maps.sources, self.key, struct.pack("=i", self.source.fileno()))
        self.source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def forget(self) -> None:
        """Take back what `prepare` has done; the sockets themselves are taken out of the maps when they are closed."""
        for place in (self._accelerator.maps.targets, self._accelerator.maps.streams, self._accelerator.maps.ended):
            with contextlib.suppress(OSError):
                syscall.delete(place, self.key)

    @property
    def moved(self) -> int:
        """Bytes that were passed on."""
        redirected = self._final if self._final is not None else self._moved().redirected
        return self._before + redirected + (self._copying.moved if self._copying is not None else 0)

    def move(self) -> bool:
        """See to what has happened, and update `wish`; the value is that of `Flow.move`. Raises OSError."""
        if self._copying is not None:
            return self._move_rest(self._copying)
        if self.stage is Stage.OVER:
            return False
        # First: this call waits until the kernel is done with a segment, its bytes and its FIN, and epoll does not.
        state = _Info.of(self.source).state
        moved = self._moved()
        if state == _CLOSE:
            self._complain()
        if moved.end:
            moved = self._moved()  # the count may have been read before the last bytes, and the end after them
            _raise_if_broken(moved)
        elif state not in _HAS_ENDED:
            return False
        # What is acknowledged between the two calls is missing from the sum, which errs on the safe side.
        if _Info.of(self.sink).acked + _queued(self.sink, _SIOCOUTQ) < self._sent_before + moved.redirected:
            self.wish = SENT
            self._wait()
            return False
        self._final = moved.redirected
        if moved.end:
            return self._copy()
        self._be_over()
        self.sink.shutdown(socket.SHUT_WR)
        return False

    def is_chatty(self) -> bool:
        """See `Flow`."""
        return False

    def abandon(self) -> None:
        """Nothing more will be moved, because the connection is over."""
        if self._final is None:
            self._final = self._moved().redirected
        if self._copying is not None:
            self._copying.abandon()
        self._be_over()
        self.forget()
        self._accelerator.leave(self)

    def _copy(self) -> bool:
        """Go on without the kernel."""
        self._accelerator.over += 1
        self.stage = Stage.COPYING
        read_before = self._read_before + (self._final or 0)
        self._copying = _RestFlow(self, self._accelerator.buffer, read_before)
        self._patience = _FIRST_PATIENCE
        return self._move_rest(self._copying)

    def _move_rest(self, flow: _RestFlow) -> bool:
        _raise_if_broken(self._moved())
        if flow.wish is SENT:
            flow.wish = READ
        is_quiet = flow.move()
        self.wish = flow.wish
        if flow.wish is DONE:
            self._be_over()
        elif flow.wish is SENT:
            self._wait()
        return is_quiet

    def _be_over(self) -> None:
        self.stage = Stage.OVER
        self.wish = DONE

    def _wait(self) -> None:
        if not self._is_waiting:
            self._is_waiting = True
            self._accelerator.loop.later(self._patience, self._look_again)
            self._patience = min(2 * self._patience, _LAST_PATIENCE)

    def _look_again(self) -> None:
        self._is_waiting = False
        self._accelerator.loop.attempt(self.nudge)

    def _complain(self) -> None:
        """Raise why the source is closed, unless that is because both sides have ended."""
        code = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))

    def _moved(self) -> _Moved:
        raw = syscall.lookup(self._accelerator.maps.streams, self.key, _STREAM.size)
        assert raw is not None
        return _Moved(*_STREAM.unpack(raw))


def _raise_if_broken(moved: _Moved) -> None:
    """Raise OSError when the program had to drop bytes, for lack of memory."""
    if moved.end == _BROKEN:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


Flows = tuple[Flow | RedirectedFlow, Flow | RedirectedFlow]
"""Up and down."""

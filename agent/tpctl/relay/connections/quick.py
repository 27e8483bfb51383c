"""A connection whose messages are small, with fewer system calls: most stay so from their beginning to their end.

Both sockets are watched once, edge-triggered (epoll(7)), and never again: a read that does not fill the buffer has left
nothing behind, and the kernel tells of what comes later. Whatever else happens changes the connection back, once and
for good, to what `Connection` does: epoll tells again, level-triggered, of all that there is. That is a stream that
fills the buffer, a sink that is full, an error, urgent data (at whose mark a read stops), and the kernel that is to
move the bytes.

The client's socket stays one that blocks, so every call says that it does not want to wait (MSG_DONTWAIT).
"""

from __future__ import annotations

from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from typing import TypeGuard

from tpctl.relay.connections.connection import AnyFlow, Connection
from tpctl.relay.connections.pump import DONE, READ, Flow
from tpctl.relay.connections.states import State
from tpctl.relay.loop.bare_socket import Socket

_CLIENT = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET
_USUAL = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLHUP
"""Bytes, the end of a stream, and the end of both."""
_STALE = -2
"""What a socket is watched for must be changed, whatever is wanted."""


class QuickConnection(Connection):
    """For plain TCP on both sides."""

    __slots__ = ("_heard", "_is_quick")

    def start(self) -> None:
        """See `Connection`."""
        self._is_quick = True
        self._heard = 0
        """What epoll has told of the client before its upstream was reached."""
        self._context.exchange.loop.watch(self._client.fileno(), _CLIENT, self._on_client_edge)
        self._dialling.start()

    def _begin(self, upstream: Socket, told: int) -> None:
        if not self._is_quick:
            super()._begin(upstream, told)
            return
        self.state = State.RELAYING
        self._context.exchange.loop.hand_over(upstream.fileno(), self._on_upstream_edge)
        if self._heard:
            self._on_client_edge(self._heard)
        if self._is_quick:
            self._on_upstream_edge(told)

    def _on_client_edge(self, mask: int) -> None:
        up = self._up
        if up is None:
            self._heard |= mask
            if mask & (EPOLLERR | EPOLLHUP):
                self._change_back()
        elif mask == EPOLLIN:  # nearly always
            try:
                if up.move():
                    return
            except OSError as error:
                self.reset(error, self._who_reset())
            self._arm()
        else:
            self._on_end_of_stream(mask, up)

    def _on_upstream_edge(self, mask: int) -> None:
        down = self._down
        if down is None or mask == EPOLLOUT:
            return
        if mask | EPOLLOUT == EPOLLIN | EPOLLOUT:  # nearly always
            try:
                if down.move():
                    return
            except OSError as error:
                self.reset(error, self._who_reset())
            self._arm()
        else:
            self._on_end_of_stream(mask, down)

    def _on_end_of_stream(self, mask: int, flow: AnyFlow) -> None:
        """Read what comes before it, and the end itself."""
        if mask & ~_USUAL:
            self._change_back()
            return
        try:
            is_left = flow.move() and flow.move()
        except OSError as error:
            self.reset(error, self._who_reset())
            return
        if is_left:
            self._change_back()
        else:
            self._arm()

    def _arm(self) -> None:
        """See `Connection`; wait on without a system call when all is as usual."""
        up, down = self._up, self._down
        if not self._is_quick or up is None or down is None or (up.wish is DONE and down.wish is DONE):
            super()._arm()
        elif not _is_small(up) or not _is_small(down) or (up.is_chatty() and down.is_chatty()):
            self._change_back()
        elif up.wish is DONE or down.wish is DONE:
            self.state = State.HALF_CLOSED
            for flow in (up, down):
                flow.is_last = flow.wish is READ

    def _change_back(self) -> None:
        """Be like any `Connection` from now on. Epoll tells of all that there is once more."""
        self._is_quick = False
        self._client.setblocking(False)
        loop = self._context.exchange.loop
        if self._upstream is None or self._up is None:
            loop.watch(self._client.fileno(), 0, self._on_client)
            return
        loop.hand_over(self._client.fileno(), self._on_client)
        loop.hand_over(self._upstream.fileno(), self._on_upstream)
        self._client_mask = self._upstream_mask = _STALE
        super()._arm()


def _is_small(flow: AnyFlow) -> TypeGuard[Flow]:
    """Whether it moves small messages, or has ended."""
    return isinstance(flow, Flow) and not flow.is_bulk and (flow.wish is READ or flow.wish is DONE)

"""Both ends of the torture's connections, each a process and a loop. They say what went wrong, else nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import struct

from tests.torture.script import HEADER, RESETS, Script, Way

_CHUNK = 128 * 1024
_STALL_SECONDS = 1.0
_SLOW_SECONDS = 0.05
_AT_ONCE = 256
"""Connections that are being made at a time: a listener's queue has its limit."""
_LINGER_RESETS = struct.pack("ii", 1, 0)


class Failures(list[str]):
    """What went wrong."""

    def note(self, script: Script, what: str) -> None:
        """Something went wrong on a connection."""
        self.append(f"connection {script.number} ({script.way.name}, {script.up} up, {script.down} down): {what}")


async def send(sock: socket.socket, script: Script, *, is_up: bool) -> None:
    """Send a stream, and its end, unless the connection is to be reset."""
    loop = asyncio.get_running_loop()
    size = script.up if is_up else script.down
    resets = script.way is (Way.CLIENT_RESETS if is_up else Way.SERVER_RESETS)
    half = size // 2
    for piece in script.pieces(size, is_up=is_up):
        await loop.sock_sendall(sock, piece)
        half -= len(piece)
        if half <= 0 and resets:
            break
        if half <= 0 and script.way is Way.STALLS:
            await asyncio.sleep(_STALL_SECONDS)
            half = size
    if not resets:
        sock.shutdown(socket.SHUT_WR)


async def receive(sock: socket.socket, script: Script, *, is_up: bool) -> str | None:
    """Receive a stream; what is wrong with it."""
    loop = asyncio.get_running_loop()
    size, digest = 0, hashlib.sha256()
    slow = script.way is (Way.SLOW_SERVER if is_up else Way.SLOW_CLIENT)
    while data := await loop.sock_recv(sock, 4096 if slow and size < 40_000 else _CHUNK):
        size += len(data)
        digest.update(data)
        if slow and size < 40_000:
            await asyncio.sleep(_SLOW_SECONDS)
    expected = script.up if is_up else script.down
    if script.way in RESETS:
        return f"{size} of {expected} bytes, and then a regular end instead of a reset"
    if size != expected:
        return f"{size} of {expected} bytes"
    return None if digest.digest() == script.digest(expected, is_up=is_up) else "other bytes than were sent"


async def converse(sock: socket.socket, script: Script, failures: Failures, *, is_client: bool, messages: int) -> None:
    """Play one end of a connection, after so many small messages each way."""
    first = {Way.CLIENT_FIRST: True, Way.SERVER_FIRST: False}.get(script.way)
    who = "client" if is_client else "server"
    resetting = script.way is (Way.CLIENT_RESETS if is_client else Way.SERVER_RESETS)
    try:
        await talk(sock, messages, is_client=is_client)
        if resetting:
            await send(sock, script, is_up=is_client)
            await asyncio.sleep(_SLOW_SECONDS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESETS)
            return
        if first is None:
            sending = asyncio.create_task(send(sock, script, is_up=is_client))
            try:
                wrong = await receive(sock, script, is_up=not is_client)
                await sending
            finally:
                sending.cancel()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await sending
        elif first is is_client:
            await send(sock, script, is_up=is_client)
            wrong = await receive(sock, script, is_up=not is_client)
        else:
            wrong = await receive(sock, script, is_up=not is_client)
            await send(sock, script, is_up=is_client)
        if wrong is not None:
            failures.note(script, f"the {who} got {wrong}")
    except OSError as error:
        if script.way not in RESETS:
            failures.note(script, f"the {who}: {error}")
    finally:
        sock.close()


async def talk(sock: socket.socket, times: int, *, is_client: bool) -> None:
    """Exchange so many small messages, each an answer to the one before."""
    loop = asyncio.get_running_loop()
    for _ in range(times):
        if is_client:
            await loop.sock_sendall(sock, b"?")
        if not await loop.sock_recv(sock, 1):
            raise ConnectionResetError("ended while it talked")
        if not is_client:
            await loop.sock_sendall(sock, b"!")


async def clients(sockets: list[socket.socket], address: tuple[str, int], seed: int, messages: int = 0) -> Failures:
    """Connect all of them, and when all are connected, let each play its part, after so many small messages."""
    loop, failures = asyncio.get_running_loop(), Failures()
    gate = asyncio.Semaphore(_AT_ONCE)

    gone = set()

    async def connect(number: int, sock: socket.socket) -> None:
        async with gate:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            await loop.sock_sendall(sock, number.to_bytes(HEADER, "big"))
            try:
                await loop.sock_recv(sock, 1)
            except ConnectionResetError:  # servers do not wait until all are connected
                if Script.of(seed, number).way is not Way.SERVER_RESETS:
                    raise
                gone.add(sock)

    await asyncio.gather(*(connect(number, sock) for number, sock in enumerate(sockets)))
    scripts = [Script.of(seed, number) for number in range(len(sockets))]
    pairs = [pair for pair in zip(sockets, scripts, strict=True) if pair[0] not in gone]
    await asyncio.gather(
        *(converse(sock, script, failures, is_client=True, messages=messages) for sock, script in pairs)
    )
    return failures


async def server(listener: socket.socket, seed: int, count: int, messages: int = 0) -> Failures:
    """Serve that many connections to their ends."""
    loop, failures = asyncio.get_running_loop(), Failures()
    listener.setblocking(False)

    async def one(sock: socket.socket) -> None:
        head = b""
        while len(head) < HEADER:
            if not (more := await loop.sock_recv(sock, HEADER - len(head))):  # for ever, if it was asked again
                raise ConnectionResetError("ended before it said which connection it is")
            head += more
        await loop.sock_sendall(sock, b"!")
        await converse(sock, Script.of(seed, int.from_bytes(head, "big")), failures, is_client=False, messages=messages)

    tasks = []
    for _ in range(count):
        sock, _ = await loop.sock_accept(listener)
        sock.setblocking(False)
        tasks.append(asyncio.create_task(one(sock)))
    await asyncio.gather(*tasks)
    return failures

"""A server and a client of gRPC, each run in a namespace by itself: `serve PORT` and `ask ADDRESS`.

The messages are plain bytes, so nothing has to be compiled.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

SERVICE = "shop.Shop"
LARGE = bytes(range(256)) * 12_000
"""3 MB: below what gRPC takes by default."""
SECONDS = 30.0


def same(request: bytes, context: Any) -> bytes:
    """One message for one; the metadata that came is returned after it."""
    context.set_trailing_metadata(
        [("x-seen", dict(context.invocation_metadata()).get("x-asked", "")), ("x-peer", context.peer())]
    )
    return request


def count(request: bytes, _context: Any) -> Iterator[bytes]:
    """Many messages for one."""
    yield from (b"%d" % number for number in range(int(request)))


def total(requests: Iterable[bytes], _context: Any) -> bytes:
    """One message for many."""
    return b"%d" % sum(map(len, requests))


def talk(requests: Iterable[bytes], _context: Any) -> Iterator[bytes]:
    """A message for each, as it comes."""
    yield from (request.upper() for request in requests)


def fail(_request: bytes, context: Any) -> bytes:
    """An error, which is in the trailers."""
    context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
    return b""


def serve(port: str) -> None:
    """Serve plain HTTP/2 on a port of both families."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    handlers = {
        "Same": grpc.unary_unary_rpc_method_handler(same),
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Total": grpc.stream_unary_rpc_method_handler(total),
        "Talk": grpc.stream_stream_rpc_method_handler(talk),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"[::]:{port}")
    server.start()
    server.wait_for_termination()


def ask(address: str, authority: str = "") -> dict[str, Any]:
    """Every kind of call; what came of it."""
    if authority:
        credentials = grpc.ssl_channel_credentials(Path(authority).read_bytes())
        options = [("grpc.ssl_target_name_override", "server.test"), ("grpc.enable_http_proxy", 0)]
        channel = grpc.secure_channel(address, credentials, options)
    else:
        channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
    found: dict[str, Any] = {}
    with channel:
        same_, call = channel.unary_unary(f"/{SERVICE}/Same").with_call(
            LARGE, timeout=SECONDS, metadata=[("x-asked", "something")]
        )
        trailers = dict(call.trailing_metadata())
        found |= {"same": same_ == LARGE, "seen": trailers["x-seen"], "peer": trailers["x-peer"]}
        found["count"] = len(list(channel.unary_stream(f"/{SERVICE}/Count")(b"1000", timeout=SECONDS)))
        parts = (b"x" * 1000 for _ in range(1000))
        found["total"] = int(channel.stream_unary(f"/{SERVICE}/Total")(parts, timeout=SECONDS))
        found["talk"] = conversation(channel)
        for name in ("Fail", "Unknown"):
            try:
                channel.unary_unary(f"/{SERVICE}/{name}")(b"", timeout=SECONDS)
            except grpc.RpcError as error:
                found[name.lower()] = [error.code().name, error.details()]  # type: ignore[attr-defined,unused-ignore]
    return found


def conversation(channel: Any) -> list[str]:
    """Each message is sent when the one before it was answered: nothing on the way waits for more."""
    answers: list[bytes] = []

    def words() -> Iterator[bytes]:
        for word in (b"one", b"two", b"three"):
            yield word
            while not answers or answers[-1] != word.upper():
                arrived.wait(SECONDS)
                arrived.clear()

    arrived = threading.Event()
    for answer in channel.stream_stream(f"/{SERVICE}/Talk")(words(), timeout=SECONDS):
        answers.append(answer)
        arrived.set()
    return [answer.decode() for answer in answers]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        print(json.dumps(ask(*sys.argv[2:])))

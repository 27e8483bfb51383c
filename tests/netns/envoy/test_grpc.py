"""gRPC by its own library through a service of HTTP: every kind of call, with and without TLS before Envoy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.envoy.conftest import FAMILIES, HOST, Scene
from tests.netns.relay.net import run, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        importlib.util.find_spec("grpc") is None, reason="needs python3-grpcio; `make test-envoy` installs it"
    ),
]
PEER = str(Path(__file__).with_name("grpc_peer.py"))
PLAIN, TLS = 8009, 8022


@pytest.fixture(scope="module")
def application(scene: Scene) -> Iterator[Scene]:
    argv = ["nsenter", f"--net=/run/netns/{scene.net.host}", sys.executable, PEER, "serve", str(PLAIN)]
    process = subprocess.Popen(argv)
    try:
        until(lambda: process.poll() is not None or f":{PLAIN} " in scene.net.on_host("ss", "-Hltn"))
        assert process.poll() is None
        yield scene
    finally:
        process.terminate()
        process.wait()


def asked(scene: Scene, family: int, port: int, *more: str) -> dict[str, Any]:
    address = f"[{HOST[family]}]:{port}" if family == 6 else f"{HOST[family]}:{port}"
    inside = ("nsenter", f"--net=/run/netns/{scene.net.peer}")
    found: dict[str, Any] = json.loads(run(*inside, sys.executable, PEER, "ask", address, *more))
    return found


@FAMILIES
@pytest.mark.parametrize("port", [PLAIN, TLS], ids=["plain", "tls"])
def test_every_kind_of_call(application: Scene, family: int, port: int) -> None:
    more = (str(application.pki.root.path),) if port == TLS else ()
    found = asked(application, family, port, *more)
    peer = found.pop("peer")
    assert peer.startswith(("ipv4:127.0.0.6:", "ipv6:[::ffff:127.0.0.6]:", "ipv6:[::6]:", "ipv6:%5B::6%5D:")), peer
    assert found == {
        "same": True,
        "seen": "something",
        "count": 1000,
        "total": 1_000_000,
        "talk": ["ONE", "TWO", "THREE"],
        "fail": ["NOT_FOUND", "no such thing"],
        "unknown": ["UNIMPLEMENTED", "Method not found!"],
    }

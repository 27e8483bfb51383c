"""HTTP/2: a client that speaks it without TLS meets an application that does, as it would without Envoy."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.envoy.conftest import FAMILIES, HOST, Scene
from tests.netns.envoy.scene import curl
from tests.netns.relay.net import public_directory, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("nghttpd") is None, reason="needs nghttpd (nghttp2-server)"),
]
PORT = 8009
SIZE = 5 * 1024 * 1024 + 3


@pytest.fixture(scope="module")
def application(scene: Scene) -> Iterator[Scene]:
    """nghttpd sends an upload back."""
    with public_directory() as folder:
        argv = ["nsenter", f"--net=/run/netns/{scene.net.host}", "nghttpd", "--no-tls", "--echo-upload", "-d",
                str(folder), str(PORT)]  # fmt: skip
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(lambda: f":{PORT} " in scene.net.on_host("ss", "-Hltn"))
            yield scene
        finally:
            process.terminate()
            process.wait()


@FAMILIES
def test_clients_with_tls_are_offered_it(application: Scene, family: int) -> None:
    options = ("--cacert", str(application.pki.root.path), "--resolve", f"server.test:8022:{HOST[family]}")
    answer = curl(application.net, application.net.peer, "server.test", 8022, *options, "--data", "sent",
                  "-w", "\n%{http_version}\n%{http_code}", scheme="https")  # fmt: skip
    assert (answer.status, answer.body) == (200, "sent\n2")


@FAMILIES
def test_both_sides_speak_http_2(application: Scene, family: int, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(bytes(range(256)) * (SIZE // 256))
    got = tmp_path / "got"
    answer = curl(application.net, application.net.peer, HOST[family], PORT, "--http2-prior-knowledge", "-X", "POST",
                  "--data-binary", f"@{sent}", "-o", str(got), "-w", "%{http_version}\n%{http_code}")  # fmt: skip
    assert (answer.status, answer.body.strip()) == (200, "2")
    assert got.read_bytes() == sent.read_bytes()

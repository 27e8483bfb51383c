"""What is asked of requests and done with them: secrets, tokens, limits, and that everything else passes unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.extent import takes_long
from tests.netns.envoy.conftest import FAMILIES, HOST, STRANGER, TRUSTED, Scene
from tests.netns.envoy.scene import Answer, curl, headers
from tests.unit.envoy.examples import new_key, token

pytestmark = pytest.mark.root


def ask(scene: Scene, family: int, port: int, *given: str, options: tuple[str, ...] = (), path: str = "/",
        source: str | None = None) -> Answer:  # fmt: skip
    return curl(scene.net, scene.net.peer, HOST[family], port, *options, *headers(*given), path=path, source=source)


@FAMILIES
@pytest.mark.parametrize("value", ["s3cret-current", "s3cret-previous"])
def test_either_secret_of_the_origin_is_taken_and_not_passed_on(scene: Scene, family: int, value: str) -> None:
    asked = ask(scene, family, 8003, f"X-Origin-Verify: {value}").asked
    assert asked.header("x-origin-verify") == []
    assert "s3cret" not in str(asked)


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("X-Origin-Verify: wrong",),
        ("X-Origin-Verify;",),
        ("X-Origin-Verify: s3cret-current,s3cret-previous",),
        ("X-Origin-Verify: s3cret-current", "X-Origin-Verify: s3cret-current"),
        ("X-Origin-Verify: wrong", "X-Origin-Verify: s3cret-current"),
        ("X-Origin-Verify: S3CRET-CURRENT",),
        ("X-Origin-Verify: s3cret-curren",),
        ("X_Origin_Verify: s3cret-current",),
        ("X-Origin-Verify: %SECRET(s0)%",),
    ],
)  # fmt: skip
def test_nothing_else_gets_in(scene: Scene, given: tuple[str, ...]) -> None:
    answer = ask(scene, 4, 8003, *given)
    assert (answer.status, answer.body) == (403, "")


@FAMILIES
def test_an_injected_header_replaces_a_forged_one(scene: Scene, family: int) -> None:
    asked = ask(scene, family, 8004, "X-Api-Key: forged", "x-api-key: forged too").asked
    assert asked.header("x-api-key") == ["s3cret-current"]


def test_no_secret_is_in_the_configuration_that_is_shown(scene: Scene) -> None:
    shown = scene.envoy.ask("/config_dump?include_eds")
    assert "X-Api-Key" in shown
    assert "s3cret" not in shown
    assert "s3cret" not in scene.envoy.log()


@FAMILIES
def test_a_token_gets_in_and_its_claims_are_passed_on(scene: Scene, family: int) -> None:
    bearer = f"Authorization: Bearer {token(scene.folder / 'jwt.key')}"
    asked = ask(scene, family, 8005, bearer, "X-Subject: root", "X-Role: admin").asked
    assert asked.header("x-subject") == ["alice"]
    assert asked.header("x-role") == []
    assert asked.header("authorization") == []


@pytest.mark.parametrize(
    ("status", "claims"),
    [
        (401, {"expires": -600}),
        (401, {"expires": None}),
        (401, {"iss": "https://other.test"}),
        (401, {"algorithm": "none"}),
        (403, {"aud": "other"}),
    ],
    ids=str,
)  # fmt: skip
def test_other_tokens_do_not(scene: Scene, status: int, claims: dict[str, Any]) -> None:
    assert ask(scene, 4, 8005, f"Authorization: Bearer {token(scene.folder / 'jwt.key', **claims)}").status == status


def test_a_token_of_another_key_does_not(scene: Scene, tmp_path: Path) -> None:
    assert ask(scene, 4, 8005, f"Authorization: Bearer {token(new_key(tmp_path / 'jwt.key'))}").status == 401


def test_a_token_is_taken_from_its_header_alone(scene: Scene) -> None:
    good = token(scene.folder / "jwt.key")
    assert ask(scene, 4, 8005, path=f"/?access_token={good}").status == 401
    assert ask(scene, 4, 8005, f"Cookie: access_token={good}").status == 401
    assert ask(scene, 4, 8005).status == 401


@FAMILIES
def test_keys_may_come_from_a_server(scene: Scene, family: int, tmp_path: Path) -> None:
    good, bad = token(scene.folder / "jwt.key", aud="any"), token(new_key(tmp_path / "jwt.key"))
    asked = ask(scene, family, 8015, f"Authorization: Bearer {good}").asked
    assert asked.header("authorization") == [f"Bearer {good}"]
    assert ask(scene, family, 8015, f"Authorization: Bearer {bad}").status == 401
    assert ask(scene, family, 8015).status == 401


@FAMILIES
def test_each_client_has_its_own_limit(scene: Scene, family: int) -> None:
    answers = [ask(scene, family, 8006, source=STRANGER[family]).status for _ in range(5)]
    assert answers == [200, 200, 200, 429, 429]
    real = {4: "203.0.113.7", 6: "2001:db8:7::7"}[family]
    forwarded = [ask(scene, family, 8006, f"X-Forwarded-For: {real}", source=TRUSTED[family]).status for _ in range(4)]
    assert forwarded == [200, 200, 200, 429]


def test_an_ipv6_client_is_its_network(scene: Scene) -> None:
    answers = [
        ask(scene, 6, 8006, f"X-Forwarded-For: 2001:db8:8::{number}", source=TRUSTED[6]).status
        for number in range(1, 6)
    ]
    assert answers == [200, 200, 200, 429, 429]


def test_a_service_may_have_one_limit_for_all(scene: Scene) -> None:
    sources = (STRANGER[4], TRUSTED[4], STRANGER[6], TRUSTED[6])
    answers = [ask(scene, 6 if ":" in one else 4, 8008, source=one).status for one in sources]
    assert answers == [200, 200, 200, 429]


def test_strangers_do_not_use_up_the_limit_of_a_service(scene: Scene) -> None:
    assert [ask(scene, 4, 8016).status for _ in range(5)] == [403] * 5
    known = [ask(scene, 4, 8016, "X-Origin-Verify: s3cret-current").status for _ in range(3)]
    assert known == [200, 200, 429]


def test_names_of_headers_keep_their_case_where_that_is_wanted(scene: Scene) -> None:
    kept = ask(scene, 4, 8007, "X-CamelCase: 1").asked
    assert ["X-CamelCase", "1"] in kept["headers"]
    assert ["x-camelcase", "1"] in ask(scene, 4, 8001, "X-CamelCase: 1").asked["headers"]


@FAMILIES
@pytest.mark.parametrize("path", ["/a/../b//c/./%2e%2e/%2F?x=%00&y=../..", "/%41%7e", "/a;b=c/"])
def test_a_path_is_passed_as_it_came(scene: Scene, family: int, path: str) -> None:
    assert ask(scene, family, 8001, path=path, options=("--path-as-is",)).asked["line"] == f"GET {path} HTTP/1.1"


def test_clients_cannot_steer_envoy(scene: Scene) -> None:
    """Headers for its own use, which it takes from clients with private addresses by default."""
    given = ("x-envoy-upstream-rq-timeout-ms: 1", "x-envoy-original-dst-host: 127.0.0.1:9443", "x-envoy-retry-on: 5xx",
             "x-envoy-decorator-operation: x", "x-envoy-internal: true")  # fmt: skip
    for source in (STRANGER[4], TRUSTED[4]):
        asked = ask(scene, 4, 8001, *given, source=source).asked
        assert asked["local"] == [HOST[4], 8001]
        assert [name for name, _ in asked["headers"] if name.lower().startswith("x-envoy")] == []


def test_an_answer_is_passed_as_it_came(scene: Scene) -> None:
    answer = ask(scene, 4, 8001, options=("-D", "/dev/stderr"))
    assert answer.error == 0
    said = {line.partition(":")[0].lower() for line in answer.shown.splitlines() if ": " in line}
    assert said & {"server", "x-envoy-upstream-service-time", "via", "x-request-id"} == set()
    assert "content-length" in said


@FAMILIES
def test_a_body_of_any_length_arrives(scene: Scene, family: int, tmp_path: Path) -> None:
    file = tmp_path / "body"
    file.write_bytes(bytes(20 * 1024 * 1024 + 7))
    for more in ((), ("Transfer-Encoding: chunked",)):
        answer = ask(scene, family, 8001, *more, "Expect:", options=("-T", str(file)))
        assert answer.asked["length"] == 20 * 1024 * 1024 + 7


@takes_long
@FAMILIES
def test_much_is_passed_both_ways(scene: Scene, family: int, tmp_path: Path) -> None:
    file, got = tmp_path / "sent", tmp_path / "got"
    with file.open("wb") as sparse:
        sparse.truncate(300 * 1024 * 1024)
    assert ask(scene, family, 8001, "Expect:", options=("-T", str(file))).asked["length"] == 300 * 1024 * 1024
    answer = ask(scene, family, 8001, path=f"/?bytes={500 * 1024 * 1024}", options=("-o", str(got)))
    assert (answer.status, got.stat().st_size) == (200, 500 * 1024 * 1024)


@takes_long
def test_an_answer_may_take_longer_than_a_route_of_envoys_does(scene: Scene) -> None:
    assert ask(scene, 4, 8001, path="/?wait=17").status == 200


@FAMILIES
def test_a_websocket(scene: Scene, family: int) -> None:
    with scene.net.connect(scene.net.peer, (HOST[family], 8001)) as client:
        client.sendall(b"GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                       b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")  # fmt: skip
        stream = client.makefile("rb")
        assert b" 101 " in stream.readline()
        while stream.readline().strip():
            pass
        for message in (b"\x81\x05hello", b"x" * 100_000):
            client.sendall(message)
            assert stream.read(len(message)) == message


def test_http_1_0(scene: Scene) -> None:
    assert ask(scene, 4, 8001, options=("--http1.0",)).status == 200


@FAMILIES
def test_an_application_that_is_away_is_told_of(scene: Scene, family: int) -> None:
    assert ask(scene, family, 8008, options=("-X", "CONNECT")).status in (400, 404, 405)
    assert curl(scene.net, scene.net.peer, HOST[family], 8042).status == 503


def test_metrics_and_readiness_and_nothing_else(scene: Scene) -> None:
    def status(path: str, *options: str) -> Answer:
        return curl(scene.net, scene.net.host, "127.0.0.1", 9902, *options, path=path)

    assert "envoy_http_downstream_rq_total" in status("/metrics").body
    assert status("/ready").body.strip() == "LIVE"
    for path in ("/", "/config_dump", "/quitquitquit", "/metrics/", "/metrics/../config_dump", "/stats", "/ready?x"):
        answer = status(path, "--path-as-is")
        assert answer.status == 404 or path == "/ready?x", (path, answer)
    assert status("/ready", "-X", "POST").status == 404

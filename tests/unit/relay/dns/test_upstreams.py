"""resolv.conf as the relay follows it, and the order in which its servers are asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from tpctl.relay.connections.dials import SelfDialGuard
from tpctl.relay.dns.resolvers import RECHECK_SECONDS, ResolvConf, parse
from tpctl.relay.dns.upstreams import AVOID_SECONDS, MAX_TRIES, Upstreams
from tpctl.relay.loop.complaints import Complaints


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def upstreams(path: Path, text: str, clock: Clock | None = None) -> Upstreams:
    path.write_text(text)
    clock = clock or Clock()
    guard = SelfDialGuard(frozenset({15053}), lambda _destination: False)
    return Upstreams(ResolvConf(path, clock), guard, Complaints(structlog.get_logger()), clock)


def hosts(asked: Upstreams) -> list[str]:
    return [server.host for server in asked.plan().servers]


def servers(*numbers: int) -> str:
    return "".join(f"nameserver 192.0.2.{number}\n" for number in numbers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (2.0, 2, False)),
        ("options timeout:1 attempts:3 rotate\n", (1.0, 3, True)),
        ("options timeout:1\noptions rotate\n", (1.0, 2, True)),
        ("options timeout:0 attempts:0", (1.0, 1, False)),
        ("options timeout:99 attempts:99", (30.0, 5, False)),
        ("options timeout:x attempts: timeout:-1 ndots:5 arotate", (2.0, 2, False)),
        ("options\ttimeout:1x rotates\r\n", (1.0, 2, True)),
        ("# options rotate\n; options rotate\noption rotate\n options rotate\noptions\n", (2.0, 2, False)),
    ],
)
def test_options(text: str, expected: tuple[float, int, bool]) -> None:
    found = parse(text)
    assert (found.timeout_seconds, found.attempts, found.rotate) == expected


@given(st.text(alphabet=st.sampled_from("options rotatemu:0123456789\nnameserver.%#;é"), max_size=200))
def test_any_resolv_conf_is_read(text: str) -> None:
    found = parse(text)
    assert 1 <= found.attempts <= 5
    assert 1 <= found.timeout_seconds <= 30


def test_resolv_conf_is_followed_and_kept_while_it_is_missing(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "resolv.conf"
    path.write_text(servers(1))
    conf = ResolvConf(path, clock)
    assert conf.current() == parse(servers(1))
    path.write_text(servers(22))
    assert conf.current() == parse(servers(1)), "not looked at on every query"
    clock.now += RECHECK_SECONDS
    assert conf.current() == parse(servers(22))
    path.unlink()
    clock.now += RECHECK_SECONDS
    assert conf.current() == parse(servers(22))


def test_without_a_file_this_host_is_asked(tmp_path: Path) -> None:
    assert ResolvConf(tmp_path / "none").current() == parse("") == parse("nameserver 127.0.0.1")


def test_servers_are_asked_in_turn_as_often_as_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    assert hosts(upstreams(path, servers(1, 2))) == ["192.0.2.1", "192.0.2.2"] * 2
    assert hosts(upstreams(path, servers(1, 2) + "options attempts:1")) == ["192.0.2.1", "192.0.2.2"]
    plan = upstreams(path, servers(*range(1, 9)) + "options attempts:5 timeout:7").plan()
    assert (len(plan.servers), plan.distinct, plan.timeout_seconds) == (MAX_TRIES, 3, 7.0)
    assert hosts(upstreams(path, "")) == ["127.0.0.1"] * 2


def test_each_query_begins_with_another_server(tmp_path: Path) -> None:
    asked = upstreams(tmp_path / "resolv.conf", servers(1, 2, 3) + "options rotate attempts:1")
    assert sorted(hosts(asked)[0] for _ in range(6)) == ["192.0.2.1"] * 2 + ["192.0.2.2"] * 2 + ["192.0.2.3"] * 2


def test_a_silent_server_is_asked_last_and_one_query_finds_out_about_it(tmp_path: Path) -> None:
    clock = Clock()
    asked = upstreams(tmp_path / "resolv.conf", servers(1, 2) + "options attempts:1", clock)
    first, second = asked.plan().servers
    asked.failed(first)
    assert asked.plan().servers == (second, first)
    clock.now += AVOID_SECONDS
    assert asked.plan().servers == (first, second), "this one tries it again"
    assert asked.plan().servers == (second, first), "but not the next"
    asked.answered(first)
    assert asked.plan().servers == (first, second)


def test_a_changed_file_is_a_new_start(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "resolv.conf"
    asked = upstreams(path, servers(1, 2) + "options attempts:1", clock)
    asked.failed(asked.plan().servers[0])
    path.write_text(servers(1, 2) + "options attempts:1 edns0")
    clock.now += RECHECK_SECONDS
    assert hosts(asked) == ["192.0.2.1", "192.0.2.2"]


def test_a_server_whose_interface_is_missing_is_left_out_until_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = upstreams(tmp_path / "resolv.conf", "nameserver fe80::1%eth77\nnameserver 192.0.2.1\noptions attempts:1")
    assert hosts(asked) == ["192.0.2.1"]
    monkeypatch.setattr("socket.if_nametoindex", lambda _name: 7)
    assert hosts(asked) == ["fe80::1", "192.0.2.1"]
    assert asked.plan().servers[0].scope == 7

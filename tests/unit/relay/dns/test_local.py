"""The local zone in use: what is kept of its answers, and how its file is followed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import pytest
import structlog
from structlog.testing import capture_logs

from tpctl.relay.dns import local as dns_local
from tpctl.relay.dns import message as dns_message
from tpctl.relay.dns.counters import DnsCounters
from tpctl.relay.dns.local import LocalZone
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.dns import DnsSettings
from tpctl.system.errors import InputError

MANY = "".join(f"10.0.0.{number} many.mesh\n" for number in range(1, 101))
HOSTS = "240.0.0.1 db.mesh\n" + MANY


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.release()


class Zone:
    """A local zone of a hosts file, asked in Python."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self.path = path
        self.counters = DnsCounters()
        self.late = 60.0
        """Seconds after which the file is looked at."""
        clock = lambda: path.stat().st_mtime + self.late  # noqa: E731
        self.local = LocalZone(DnsSettings(zone_file=path), loop, self.counters, structlog.get_logger(), clock)

    def answer(self, query: dns.message.Message, *, udp: bool = True) -> dns.message.Message | None:
        wire = query.to_wire()
        question = dns_message.question_of(wire)
        assert question is not None
        answer = self.local.answer(wire, question, udp)
        return dns.message.from_wire(answer) if answer else None

    def addresses(self, name: str = "db.mesh", *, udp: bool = True) -> list[str]:
        answer = self.answer(dns.message.make_query(name, "A"), udp=udp)
        assert answer is not None
        return [str(rdata) for rrset in answer.answer for rdata in rrset]

    def follow(self) -> None:
        """What a second of the loop would do, and the thread's end."""
        self.local.refresh()
        end = time.monotonic() + 60
        while self.local._reader is not None:
            assert time.monotonic() < end
            time.sleep(0.01)
            self.local.refresh()

    def write(self, text: str) -> None:
        """As if the file had been written a minute ago, each time at another moment."""
        self.path.write_text(text)
        moment = time.time_ns() - 60 * 10**9
        os.utime(self.path, ns=(moment, moment))


@pytest.fixture
def zone(loop: Loop, tmp_path: Path) -> Zone:
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    return Zone(loop, path)


def test_other_names_are_for_the_name_servers(zone: Zone) -> None:
    assert zone.answer(dns.message.make_query("example.com", "A")) is None
    assert zone.answer(dns.message.make_query("mesh.com", "A")) is None
    assert zone.counters.local == 0


def test_without_a_file_every_name_is(loop: Loop) -> None:
    local = LocalZone(DnsSettings(), loop, DnsCounters(), structlog.get_logger())
    wire = dns.message.make_query("db.mesh", "A").to_wire()
    question = dns_message.question_of(wire)
    assert question is not None
    assert local.answer(wire, question, True) is None
    assert local.vips.upstreams(Destination("240.0.0.1", 80)) is None


def test_names_of_a_zone_that_is_still_being_read_are_not_for_the_name_servers(zone: Zone) -> None:
    zone.write("10.0.0.7 plain.other")
    zone.local.use(DnsSettings(zone_file=zone.path, zone="other"))
    query = dns.message.make_query("plain.other", "A")
    early = zone.answer(query)  # nobody has looked after the thread that reads it
    assert early is not None
    assert early.rcode() == dns.rcode.SERVFAIL
    assert zone.addresses("db.mesh") == ["240.0.0.1"]
    assert zone.answer(dns.message.make_query("example.com", "A")) is None
    zone.follow()
    assert zone.addresses("plain.other") == ["10.0.0.7"]
    assert zone.answer(dns.message.make_query("db.mesh", "A")) is None
    zone.local.use(DnsSettings())
    assert zone.answer(query) is None


def test_a_kept_answer_is_the_answer_under_the_new_id(zone: Zone) -> None:
    for identifier in (1, 2, 3):
        for name in ("db.mesh", "none.mesh", "DB.mesh"):
            query = dns.message.make_query(name, "A", id=identifier)
            first, again = zone.answer(query), zone.answer(query)
            assert first == again
            assert first is not None
            assert first.id == identifier
            assert first.question[0].name.to_text() == f"{name}."
    assert zone.counters.local == 18


@pytest.mark.parametrize("udp_first", [True, False])
def test_what_is_truncated_over_udp_is_whole_over_tcp(zone: Zone, udp_first: bool) -> None:
    query = dns.message.make_query("many.mesh", "A")
    for udp in (udp_first, not udp_first, udp_first):
        answer = zone.answer(query, udp=udp)
        assert answer is not None
        assert bool(answer.flags & dns.flags.TC) is udp
        assert len(zone.addresses("many.mesh", udp=udp)) == (0 if udp else 100)


def test_several_addresses_take_turns(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("10.0.0.1 db.mesh\n10.0.0.2 db.mesh\n")
    zone = Zone(loop, path)
    assert {tuple(zone.addresses()) for _ in range(100)} == {("10.0.0.1", "10.0.0.2"), ("10.0.0.2", "10.0.0.1")}


def test_few_answers_are_kept(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_local, "_MAX_CACHED", 10)
    for number in range(100):
        assert zone.addresses(f"n{number}.mesh") == []
        assert len(zone.local._answers) <= 10
    padded = dns.message.make_query("db.mesh", "A", use_edns=0, pad=468)
    before = len(zone.local._answers)
    assert zone.answer(padded) is not None
    assert len(zone.local._answers) == before, "a long query is not worth its room"


def test_a_changed_file_is_used_and_what_was_kept_is_not(zone: Zone) -> None:
    assert zone.addresses() == ["240.0.0.1"]
    zone.follow()
    assert zone.counters.reloads == 0
    zone.write("240.0.0.2 db.mesh\n")
    zone.follow()
    assert zone.addresses() == ["240.0.0.2"]
    assert (zone.counters.reloads, zone.counters.rejected_reloads) == (1, 0)


@pytest.mark.parametrize("text", ["nonsense", "240.0.0.2 db.other", "\xff\xfe"])
def test_an_unusable_file_is_logged_once_and_the_last_zone_stays(zone: Zone, text: str) -> None:
    with capture_logs() as logged:
        zone.write(text)
        zone.follow()
        zone.follow()
    assert [line["log_level"] for line in logged] == ["warning"]
    assert zone.addresses() == ["240.0.0.1"]
    assert (zone.counters.reloads, zone.counters.rejected_reloads) == (0, 1)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_file_for_which_there_was_no_room_is_read_later(
    zone: Zone, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_arguments: object, **_named: object) -> bytes:
        raise OSError(number, os.strerror(number))

    zone.write("240.0.0.2 db.mesh\n")
    with monkeypatch.context() as crowded:  # others took what there was between two calls
        crowded.setattr("tpctl.system.input_files._content", refuse)
        zone.follow()
    assert zone.addresses() == ["240.0.0.1"]
    assert zone.counters.rejected_reloads == 0
    zone.follow()
    assert zone.addresses() == ["240.0.0.2"]


def test_a_file_that_goes_and_comes_again(zone: Zone) -> None:
    zone.path.unlink()
    zone.follow()
    assert zone.addresses() == ["240.0.0.1"]
    zone.write("240.0.0.2 db.mesh\n")
    zone.follow()
    assert zone.addresses() == ["240.0.0.2"]


def test_a_file_that_is_being_written_is_waited_for(zone: Zone) -> None:
    zone.late = 0.1
    zone.path.write_text("240.0.0.2 db.mesh\n240.0.")
    zone.follow()
    zone.late = 60.0
    zone.write("240.0.0.2 db.mesh\n")
    zone.follow()
    assert zone.addresses() == ["240.0.0.2"]
    assert zone.counters.rejected_reloads == 0


def test_the_names_of_a_file_that_is_unusable_at_the_start_wait_for_it(loop: Loop, tmp_path: Path) -> None:
    """It was in order when the relay began: this worker takes the place of one that has died."""
    path = tmp_path / "hosts"
    with pytest.raises(InputError, match="No such file"):
        dns_local.read_zone(DnsSettings(zone_file=path))
    zone = Zone(loop, path)
    answer = zone.answer(dns.message.make_query("db.mesh", "A"))
    assert answer is not None
    assert answer.rcode() == dns.rcode.SERVFAIL
    assert zone.answer(dns.message.make_query("elsewhere.test", "A")) is None
    zone.write(HOSTS)
    zone.follow()
    assert zone.addresses() == ["240.0.0.1"]


def test_other_settings_bring_another_file_or_none(zone: Zone, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("10.0.0.1 db.prod\n")
    os.utime(other, (1, 1))
    zone.local.use(DnsSettings(zone_file=other, zone="prod"))
    assert zone.addresses() == ["240.0.0.1"], "until the other file has been read"
    zone.follow()
    assert zone.addresses("db.prod") == ["10.0.0.1"]
    assert zone.answer(dns.message.make_query("db.mesh", "A")) is None
    zone.local.use(DnsSettings())
    assert zone.answer(dns.message.make_query("db.prod", "A")) is None
    zone.follow()
    assert zone.answer(dns.message.make_query("db.prod", "A")) is None


def test_what_was_read_for_former_settings_is_not_used(zone: Zone) -> None:
    zone.write("240.0.0.2 db.mesh\n")
    zone.local.refresh()
    zone.local.use(DnsSettings())
    zone.follow()
    assert zone.answer(dns.message.make_query("db.mesh", "A")) is None
    assert zone.counters.reloads == 0

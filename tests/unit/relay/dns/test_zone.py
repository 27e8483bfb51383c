"""The local zone: what it answers, and how it is read. dnspython plays the client."""

from __future__ import annotations

import contextlib
from pathlib import Path

import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpctl.config.values import BadValueError
from tpctl.relay.dns import message as dns_message
from tpctl.relay.dns.vips import Vips
from tpctl.relay.dns.zone import UDP_PAYLOAD, Zone
from tpctl.relay.dns.zone_file import MAX_FILE_SIZE, parse_hosts, parse_yaml_zone, read_zone_file, wire_name
from tpctl.relay.loop.original_destination import Destination
from tpctl.system.errors import InputError

V6 = 10
HOSTS = """
# comment
240.0.0.1  db.mesh DB-Primary.Mesh.   # two names
fd00::1    db.mesh
240.0.0.9  deep.in.the.mesh

10.0.0.1   mesh
"""
ZONE = parse_hosts(HOSTS, "mesh")


def ask(zone: Zone, query: dns.message.Message, *, udp: bool = True) -> dns.message.Message:
    wire = query.to_wire()
    question = dns_message.question_of(wire)
    assert question is not None
    assert zone.covers(question.name)
    answer = zone.answer(wire, question, udp=udp)
    assert dns_message.is_answer_to(answer, query.id, wire, question)
    return dns.message.from_wire(answer)


def answers(name: str, kind: str, zone: Zone = ZONE) -> list[str]:
    return [str(rdata) for rrset in ask(zone, dns.message.make_query(name, kind)).answer for rdata in rrset]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("db.mesh", "A", ["240.0.0.1"]),
        ("DB.mEsH", "AAAA", ["fd00::1"]),
        ("db.mesh", "ANY", ["240.0.0.1", "fd00::1"]),
        ("db-primary.mesh", "A", ["240.0.0.1"]),
        ("deep.in.the.mesh", "A", ["240.0.0.9"]),
        ("mesh", "A", ["10.0.0.1"]),
        ("mesh", "NS", ["mesh."]),
    ],
)
def test_what_there_is(name: str, kind: str, expected: list[str]) -> None:
    assert answers(name, kind) == expected


@pytest.mark.parametrize(
    ("name", "kind", "rcode"),
    [
        ("db-primary.mesh", "AAAA", dns.rcode.NOERROR),
        ("db.mesh", "HTTPS", dns.rcode.NOERROR),
        ("db.mesh", "SOA", dns.rcode.NOERROR),
        ("mesh", "AAAA", dns.rcode.NOERROR),
        ("in.the.mesh", "A", dns.rcode.NOERROR),
        ("the.mesh", "ANY", dns.rcode.NOERROR),
        ("not.the.mesh", "A", dns.rcode.NXDOMAIN),
        ("x.db.mesh", "A", dns.rcode.NXDOMAIN),
        ("*.mesh", "A", dns.rcode.NXDOMAIN),
    ],
)
def test_what_there_is_not_comes_with_the_soa(name: str, kind: str, rcode: int) -> None:
    answer = ask(ZONE, dns.message.make_query(name, kind))
    assert answer.rcode() == rcode
    assert not answer.answer
    [soa] = answer.authority
    assert (soa.name.to_text(), soa.rdtype) == ("mesh.", dns.rdatatype.SOA)
    assert soa.ttl == soa[0].minimum == 10, "RFC 2308, 5: the smaller of the two is how long this is remembered"


def test_the_soa_itself_and_its_serial_changes_with_the_names() -> None:
    [soa] = ask(ZONE, dns.message.make_query("mesh", "SOA")).answer
    [same] = ask(parse_hosts(HOSTS, "mesh"), dns.message.make_query("mesh", "SOA")).answer
    [other] = ask(parse_hosts("240.0.0.1 db.mesh", "mesh"), dns.message.make_query("mesh", "SOA")).answer
    assert soa[0].serial == same[0].serial != other[0].serial


def test_flags() -> None:
    query = dns.message.make_query("db.mesh", "A", want_dnssec=True, payload=4096)
    query.flags |= dns.flags.CD
    answer = ask(ZONE, query)
    assert answer.flags & (dns.flags.QR | dns.flags.AA | dns.flags.RD | dns.flags.RA | dns.flags.AD) == (
        dns.flags.QR | dns.flags.AA | dns.flags.RD | dns.flags.RA
    )
    assert (answer.edns, answer.payload, answer.ednsflags & dns.flags.DO) == (0, UDP_PAYLOAD, dns.flags.DO)
    query = dns.message.make_query("db.mesh", "A", flags=0)
    answer = ask(ZONE, query)
    assert not answer.flags & dns.flags.RD
    assert answer.edns == -1


def test_the_case_of_the_question_is_that_of_the_answer() -> None:
    answer = ask(ZONE, dns.message.make_query("dB.MEsh", "A"))
    assert answer.question[0].name.to_text() == answer.answer[0].name.to_text() == "dB.MEsh."


def test_what_is_not_answered() -> None:
    query = dns.message.make_query("db.mesh", "A", use_edns=1)
    assert ask(ZONE, query).rcode() == dns.rcode.BADVERS
    assert ask(ZONE, dns.message.make_query("db.mesh", "A", rdclass="CH")).rcode() == dns.rcode.REFUSED
    assert ask(ZONE, dns.message.make_query("mesh", "AXFR")).rcode() == dns.rcode.REFUSED
    query = dns.message.make_query("mesh", "SOA")
    query.set_opcode(dns.opcode.NOTIFY)
    assert ask(ZONE, query).rcode() == dns.rcode.NOTIMP


@pytest.mark.parametrize(("payload", "udp", "whole"), [(-1, True, False), (4096, True, False), (-1, False, True)])
def test_a_long_answer_is_truncated_over_udp(payload: int, udp: bool, whole: bool) -> None:
    zone = parse_hosts("".join(f"240.0.{number}.1 many.mesh\n" for number in range(200)), "mesh")
    query = dns.message.make_query("many.mesh", "A")
    if payload > 0:
        query.use_edns(0, payload=payload)
    answer = ask(zone, query, udp=udp)
    assert bool(answer.flags & dns.flags.TC) is not whole
    assert [len(rrset) for rrset in answer.answer] == ([200] if whole else [])


@pytest.mark.parametrize(("payload", "fits"), [(0, False), (600, False), (1232, True)])
def test_edns_says_how_much_fits(payload: int, fits: bool) -> None:
    zone = parse_hosts("".join(f"240.0.{number}.1 many.mesh\n" for number in range(60)), "mesh")
    query = dns.message.make_query("many.mesh", "A", use_edns=0, payload=payload)
    assert bool(ask(zone, query).flags & dns.flags.TC) is not fits


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        (b"\x04mesh\0", True),
        (b"\x02db\x04mesh\0", True),
        (b"\x07db\x04mesh\0", False),  # one label whose octets end like the zone
        (b"\x05xmesh\0", False),
        (b"\x04mesh\x03com\0", False),
        (b"\0", False),
    ],
)
def test_what_the_zone_covers(name: bytes, inside: bool) -> None:
    assert ZONE.covers(name) is inside


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=4), st.booleans())
def test_covering_is_by_labels(labels: list[bytes], below: bool) -> None:
    name = dns.name.Name([*labels, *([b"mesh"] if below else []), b""])
    wire = name.to_wire()
    assert wire is not None
    lower = wire.lower()
    assert ZONE.covers(lower) == name.is_subdomain(dns.name.from_text("mesh."))


@given(st.binary(max_size=300), st.binary(min_size=2, max_size=2), st.integers(0, 255), st.booleans())
@settings(max_examples=3000)
def test_any_query_for_a_name_of_the_zone_is_answered(rest: bytes, counts: bytes, flags: int, udp: bool) -> None:
    """Whatever stands behind the question: compression loops, records that end early, other versions of EDNS."""
    name = b"\x02db\x04mesh\0\0\1\0\1"
    header = b"\xab\xcd" + bytes((flags & 0x7F, 0)) + b"\0\1\0\0" + b"\0" + counts[:1] + b"\0" + counts[1:]
    query = header + name + rest
    question = dns_message.question_of(query)
    assert question is not None
    answer = ZONE.answer(query, question, udp=udp)
    assert answer[:2] == b"\xab\xcd"
    assert answer[2] & 0x80
    assert len(answer) <= (UDP_PAYLOAD if udp else 65535)


@pytest.mark.parametrize(
    "record",
    [
        b"\xc0\x17\0\1\0\1" + bytes(6),  # a name that points at itself
        b"\xc0\x18\xc0\x17\0\1\0\1" + bytes(6),
        b"\0\0\x29\x04\xd0\0\0\0\0\0\x08\0\x0a\0\xff1234",  # an EDNS option longer than its record
        b"\0\0\x29\x04\xd0\0\0\0\0\xff\xff",
        b"\0\0\xfa\0\xff\0\0\0\0\0\x10\x03foo\0" + bytes(16),  # TSIG
    ],
)
def test_hostile_records_are_a_format_error(record: bytes) -> None:
    query = b"\xab\xcd\1\0\0\1\0\0\0\0\0\1" + b"\x02db\x04mesh\0\0\1\0\1" + record
    question = dns_message.question_of(query)
    assert question is not None
    assert dns_message.rcode_of(ZONE.answer(query, question, udp=True)) == dns_message.Rcode.FORMERR


YAML = """
ttl: 5
names:
  plain.mesh: 10.1.1.1
  two.mesh: [10.1.1.1, "fd00::0:1"]
  db.mesh:
    addresses: [240.0.0.1, "fd00:240::1"]
    upstreams: ["10.0.0.5:5432", 10.0.0.6, "[fd00::6]:5432", "fd00::7"]
  web.mesh:
    addresses: 240.0.0.2
    upstreams:
      80: ["10.0.0.7:8080"]
      443: "10.0.0.7"
  alias.mesh:
    addresses: 240.0.0.2
"""


def test_a_yaml_zone() -> None:
    zone = parse_yaml_zone(YAML, "mesh")
    [rrset] = ask(zone, dns.message.make_query("db.mesh", "A")).answer
    assert rrset.ttl == 5
    assert answers("two.mesh", "AAAA", zone) == ["fd00::1"]
    assert answers("alias.mesh", "A", zone) == ["240.0.0.2"]
    upstreams = (
        Destination("10.0.0.5", 5432),
        Destination("10.0.0.6", 99),
        Destination("fd00::6", 5432, V6),
        Destination("fd00::7", 99, V6),
    )
    assert zone.vips.upstreams(Destination("240.0.0.1", 99)) == upstreams
    assert zone.vips.upstreams(Destination("fd00:240::1", 99, V6)) == upstreams
    assert zone.vips.upstreams(Destination("240.0.0.2", 80)) == (Destination("10.0.0.7", 8080),)
    assert zone.vips.upstreams(Destination("240.0.0.2", 443)) == (Destination("10.0.0.7", 443),)
    assert zone.vips.upstreams(Destination("240.0.0.2", 81)) == ()
    assert zone.vips.upstreams(Destination("10.1.1.1", 80)) is None, "an address without upstreams is a real one"


def test_a_name_without_upstreams_serves_nothing() -> None:
    zone = parse_yaml_zone("names: {x.mesh: {addresses: 240.0.0.1, upstreams: []}}", "mesh")
    assert zone.vips.upstreams(Destination("240.0.0.1", 80)) == ()


@pytest.mark.parametrize("text", ["", "names:", "names: {}"])
def test_a_zone_may_be_empty(text: str) -> None:
    zone = parse_yaml_zone(text, "svc.cluster.local.")
    assert ask(zone, dns.message.make_query("x.SVC.cluster.local", "A")).rcode() == dns.rcode.NXDOMAIN
    assert zone.vips == Vips({})


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("[", ["is not YAML"]),
        ("- a", ["the file: ['a'] is not a mapping"]),
        ("zones: {}", ["the file: there is no key zones; the keys are ttl, names"]),
        ("ttl: -1", ["ttl: -1 is not within"]),
        ("ttl: x\nnames: []", ["ttl: 'x'", "names: [] is not a mapping"]),
        (
            "names: {a.mesh: 10.0.0.256, b.mesh: []}",
            ["names: a.mesh: '10.0.0.256' is not an IP", "names: b.mesh: has no"],
        ),
        (
            "names: {a.other: 10.0.0.1, a..mesh: 10.0.0.1}",
            ["a.other is not a name in the zone mesh", "not a domain name"],
        ),
        ("names: {a.mesh: {address: 10.0.0.1}}", ["there is no key address; the keys are addresses, upstreams"]),
        ("names: {a.mesh: {addresses: 240.0.0.1, upstreams: [db]}}", ["'db' is not an IP address"]),
        ("names: {a.mesh: {addresses: 240.0.0.1, upstreams: ['10.0.0.1:0']}}", ["'0' is not a port"]),
        ("names: {a.mesh: {addresses: 240.0.0.1, upstreams: {x: 10.0.0.1}}}", ["'x' is not a port"]),
        ("names: {a.mesh: {addresses: 127.0.0.9, upstreams: 10.0.0.1}}", ["never reach the relay"]),
        (
            "names: {a.mesh: {addresses: 240.0.0.1, upstreams: 10.0.0.1},"
            " b.mesh: {addresses: 240.0.0.1, upstreams: 10.0.0.2}}",
            ["240.0.0.1 has other upstreams under another name"],
        ),
    ],
)
def test_every_problem_of_a_yaml_zone_is_named(text: str, problems: list[str]) -> None:
    with pytest.raises(BadValueError) as raised:
        parse_yaml_zone(text, "mesh")
    assert len(raised.value.problems) == len(problems), raised.value.problems
    for said, expected in zip(raised.value.problems, problems, strict=True):
        assert expected in said


def test_every_problem_of_a_hosts_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1 localhost\n240.0.0.1\nx db.mesh\n")
    with pytest.raises(InputError) as raised:
        read_zone_file(path, "mesh")
    assert list(raised.value.problems) == [
        f"DNS zone file {path}: line 1: localhost is not a name in the zone mesh",
        f"DNS zone file {path}: line 2: 240.0.0.1 has no name",
        f"DNS zone file {path}: line 3: 'x' is not an IP address",
    ]


def test_files_that_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "zone.yaml"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_zone_file(path, "mesh")
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_zone_file(path, "mesh")
    path.write_bytes(b"#" * (MAX_FILE_SIZE + 1))
    with pytest.raises(InputError, match="larger than"):
        read_zone_file(path, "mesh")


@pytest.mark.parametrize("name", ["a..b", "x" * 64, ".".join(["x" * 60] * 5)])
def test_a_zone_needs_a_name(name: str) -> None:
    with pytest.raises(BadValueError, match="not a domain name"):
        wire_name(name)


@given(st.text(max_size=300))
@settings(max_examples=1000)
def test_any_text_is_a_zone_or_bad_input(text: str) -> None:
    for parse in (parse_hosts, parse_yaml_zone):
        with contextlib.suppress(BadValueError):
            parse(text, "mesh")

"""The relay's DNS parsers under random input: messages, zone files and resolv.conf."""

from __future__ import annotations

import contextlib
import functools

import dns.edns
import dns.message
import dns.rrset
import dns.update

from tests.fuzz.relay import Target
from tpctl.config.values import BadValueError
from tpctl.relay.dns import message as dns_message
from tpctl.relay.dns.message import Rcode
from tpctl.relay.dns.resolvers import MAX_ATTEMPTS, MAX_TIMEOUT_SECONDS
from tpctl.relay.dns.resolvers import parse as parse_resolv_conf
from tpctl.relay.dns.tcp_upstream import framed, take_frame
from tpctl.relay.dns.zone import UDP_PAYLOAD, Zone
from tpctl.relay.dns.zone_file import parse_hosts, parse_yaml_zone

_RECORDS = (
    ("A", "192.0.2.1"), ("MX", "10 x.mesh."), ("TXT", '"abc"'), ("SOA", "a. b. 1 2 3 4 5"), ("SRV", "0 0 1 a."),
    ("SVCB", "1 . alpn=h2 ipv4hint=192.0.2.1"), ("NAPTR", '1 2 "a" "b" "c" .'), ("LOC", "1 0 0 N 1 0 0 E 1m"),
    ("APL", "1:192.0.2.0/24"), ("NSEC", "a. A AAAA"), ("CAA", '0 issue "a"'),
    ("RRSIG", "A 8 2 60 20300101000000 20200101000000 1 mesh. AAAA"),
)  # fmt: skip
_HOSTS = b"240.0.0.1 db.mesh # comment\nfd00::1 db.mesh web.mesh\n10.0.0.1 mesh\n"
_YAML = b"""ttl: 5
names:
  a.mesh: [10.0.0.1, "fd00::1"]
  b.mesh: {addresses: 240.0.0.1, upstreams: {80: ["10.0.0.5:8080", "[fd00::5]:80"]}}
"""
_YAML_FORMS = b"""names:
  "*.mesh": &one 10.0.0.1
  x\\032y.mesh.: *one
  \xc3\xbc.mesh: {<<: &two {addresses: [*one, fd00::2]}, upstreams: [10.0.0.5, "fd00::5"]}
  ? c.mesh
  : !!str 240.0.0.2
"""
_HOSTS_FORMS = (
    b"fe80::1%1\tA.Mesh. \xc3\xbc.mesh\r\n::ffff:10.0.0.1 *.mesh x\\046y.mesh # \n\n127.0.0.1 mesh\x0b10.0.0.1 b.mesh"
)
_RESOLV_CONF = b"nameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch x\noptions timeout:1 attempts:3 rotate ndots:5\n"


@functools.cache
def zone() -> Zone:
    """The zone that is asked."""
    return parse_hosts(_HOSTS.decode(), "mesh")


def queries() -> list[bytes]:
    """Queries of every shape for names of the zone, and some others."""
    made = []
    for name, kind in (
        ("db.mesh", "A"),
        ("none.db.mesh", "AAAA"),
        ("mesh", "ANY"),
        ("web.mesh", "HTTPS"),
        ("a.b", "A"),
    ):
        made.append(dns.message.make_query(name, kind).to_wire())
        made.append(dns.message.make_query(name, kind, want_dnssec=True, payload=4096, pad=64).to_wire())
    full = dns.message.make_query("db.mesh", "A")
    for kind, text in _RECORDS:
        full.additional.append(dns.rrset.from_text("db.mesh.", 60, "IN", kind, text))
        made.append(full.to_wire())
    options = [dns.edns.ECSOption("192.0.2.0", 24), dns.edns.GenericOption("10", b"12345678")]
    made.append(dns.message.make_query("db.mesh", "A", use_edns=0, options=options).to_wire())
    update = dns.update.UpdateMessage("mesh")
    update.add("a", 1, "A", "192.0.2.1")
    made.append(update.to_wire())
    made.append(made[0][:11] + b"\1" + made[0][12:] + b"\xc0\x19\0\1\0\1" + bytes(6))  # a name that points at itself
    return made


def feed_message(data: bytes) -> None:
    """Any datagram is dropped, failed, forwarded or answered; what is sent back answers it."""
    if not dns_message.is_query(data):
        return
    question = dns_message.question_of(data)
    identifier = dns_message.message_id(data)
    if question is None:
        assert dns_message.rcode_of(dns_message.failure(data, Rcode.FORMERR, None)) == Rcode.FORMERR
        return
    if not zone().covers(question.name):
        answer = dns_message.failure(data, Rcode.SERVFAIL, question)
    else:
        answer = zone().answer(data, question, udp=True)
        assert len(answer) <= UDP_PAYLOAD
    assert dns_message.is_answer_to(answer, identifier, data, question)


def feed_answer(data: bytes) -> None:
    """Whatever a name server sends is an answer to the query, or is not."""
    query = dns.message.make_query("db.mesh", "A", id=7).to_wire()
    question = dns_message.question_of(query)
    assert question is not None
    if dns_message.is_answer_to(data[:2] + b"\x81" + data[3:], 7, query, question):
        assert data[:2] == b"\0\7"


def feed_frames(data: bytes) -> None:
    """A stream is cut into the frames it is made of, and what is left is no whole frame."""
    buffer = bytearray(data)
    taken = b""
    while (message := take_frame(buffer)) is not None:
        taken += framed(message)
    assert taken + bytes(buffer) == data


def feed_hosts(data: bytes) -> None:
    """A zone, or what is wrong with it."""
    with contextlib.suppress(BadValueError):
        parse_hosts(data.decode("utf-8", "replace"), "mesh")


def feed_yaml_zone(data: bytes) -> None:
    """A zone, or what is wrong with it."""
    with contextlib.suppress(BadValueError):
        parse_yaml_zone(data.decode("utf-8", "replace"), "mesh")


def feed_resolv_conf(data: bytes) -> None:
    """Something that can be used, whatever the file says."""
    found = parse_resolv_conf(data.decode("utf-8", "replace"))
    assert 1 <= found.attempts <= MAX_ATTEMPTS
    assert 1 <= found.timeout_seconds <= MAX_TIMEOUT_SECONDS


_QUERIES = queries()
TARGETS = (
    Target("DNS queries", feed_message, _QUERIES),
    Target("DNS answers", feed_answer, [b"\0\7" + message[2:] for message in _QUERIES]),
    Target("DNS over TCP", feed_frames, [framed(message) for message in _QUERIES]),
    Target("DNS zone as hosts", feed_hosts, [_HOSTS, _HOSTS_FORMS]),
    Target("DNS zone as YAML", feed_yaml_zone, [_YAML, _YAML_FORMS]),
    Target("resolv.conf", feed_resolv_conf, [_RESOLV_CONF]),
)

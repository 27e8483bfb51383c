"""The header and question of DNS messages, with whatever anybody may send."""

from __future__ import annotations

import dns.exception
import dns.message
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpctl.relay.dns import message as dns_message
from tpctl.relay.dns.message import ELSEWHERE, HEADER_SIZE, Question, Rcode

IDS = st.integers(0, 65535)
LABELS = st.binary(min_size=1, max_size=63)
NAMES = st.lists(LABELS, max_size=6).map(
    lambda labels: b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
)
TYPES = st.binary(min_size=4, max_size=4)
HEADER = b"\x12\x34\x01\x20\x00\x01\x00\x00\x00\x00\x00\x00"
EXAMPLE = b"\x07example\x03com\x00"
QUERY = HEADER + EXAMPLE + b"\x00\x01\x00\x01"


def parsed(message: bytes) -> Question:
    question = dns_message.question_of(message)
    assert question is not None
    return question


def response(query: bytes, question: bytes, *, rcode: int = 0, count: bytes = b"\0\1") -> bytes:
    return query[:2] + bytes((0x81, 0x80 | rcode)) + count + bytes(6) + question


@given(NAMES, TYPES, st.binary(max_size=50))
def test_a_question_is_found_in_front_of_anything(name: bytes, kind: bytes, rest: bytes) -> None:
    found = dns_message.question_of(HEADER + name + kind + rest)
    if len(name) > dns_message.MAX_NAME:
        assert found is None
    else:
        assert found == Question(name.lower(), kind, HEADER_SIZE + len(name) + 4)


@given(NAMES, TYPES, st.integers(0))
def test_half_a_question_is_none(name: bytes, kind: bytes, where: int) -> None:
    whole = HEADER + name + kind
    assert dns_message.question_of(whole[: HEADER_SIZE + where % (len(whole) - HEADER_SIZE)]) is None


@pytest.mark.parametrize("count", [b"\0\0", b"\0\2", b"\xff\xff", b"\1\1"])
def test_there_must_be_one_question(count: bytes) -> None:
    assert dns_message.question_of(QUERY[:4] + count + QUERY[6:]) is None


@pytest.mark.parametrize(
    "name",
    [
        b"\xc0\x0c",  # points at itself
        b"\xc0\x00",  # points at the header
        b"\x01a\xc0\x0c",  # a loop by way of a label
        b"\x40" + b"a" * 64 + b"\0",
        b"\x80abc\0",
        (b"\x3f" + b"a" * 63) * 4 + b"\0",  # 257 octets
    ],
)
def test_a_name_that_is_compressed_or_too_long_is_no_question(name: bytes) -> None:
    assert dns_message.question_of(HEADER + name + b"\0\1\0\1") is None


@given(st.binary(max_size=400))
@settings(max_examples=2000)
def test_what_dnspython_reads_has_the_same_question(message: bytes) -> None:
    """dnspython is the oracle: a question it finds is found here, and is the same one."""
    message = HEADER + message
    found = dns_message.question_of(message)
    try:
        theirs = dns.message.from_wire(message, question_only=True, ignore_trailing=True)
    except dns.exception.DNSException:
        return
    wire = theirs.question[0].name.to_wire()
    if found is None:
        # The one thing that only dnspython accepts: a pointer into the header, which is no name anybody meant.
        assert any(octet >= 0xC0 for octet in message[HEADER_SIZE:])
    else:
        assert wire is not None
        assert found.name == wire.lower()


@given(st.binary(max_size=100))
def test_answers_and_fragments_are_no_queries(message: bytes) -> None:
    assert dns_message.is_query(message) == (len(message) >= HEADER_SIZE and message[2] < 0x80)


@given(IDS, st.binary(min_size=12, max_size=60))
def test_an_id_is_rewritten_and_nothing_else(identifier: int, message: bytes) -> None:
    rewritten = dns_message.with_id(message, identifier)
    assert dns_message.message_id(rewritten) == identifier
    assert rewritten[2:] == message[2:]


@given(st.binary(max_size=80), IDS)
def test_any_bytes_are_judged_as_an_answer(message: bytes, identifier: int) -> None:
    assert dns_message.is_answer_to(message, identifier, QUERY, parsed(QUERY)) in (True, False)


def test_an_answer_repeats_id_opcode_and_question() -> None:
    question = parsed(QUERY)
    answer = response(QUERY, QUERY[HEADER_SIZE:]) + b"records"

    def fits(message: bytes, identifier: int = 0x1234) -> bool:
        return dns_message.is_answer_to(message, identifier, QUERY, question)

    assert fits(answer)
    assert fits(response(QUERY, QUERY[HEADER_SIZE:].replace(b"example", b"eXaMple")))
    assert not fits(answer, 0x1235)
    assert not fits(QUERY)
    assert not fits(answer[:2] + b"\xa8" + answer[3:]), "the opcode is another"
    assert not fits(response(QUERY, QUERY[HEADER_SIZE:].replace(b"com", b"org")))
    assert not fits(response(QUERY, EXAMPLE + b"\x00\x1c\x00\x01"))
    assert not fits(response(QUERY, EXAMPLE + b"\x00\x01\x00\x03"))
    assert not fits(response(QUERY, QUERY[HEADER_SIZE:] * 2, count=b"\0\2"))
    assert not fits(response(QUERY, QUERY[HEADER_SIZE:-1]))


def test_types_are_not_compared_like_names() -> None:
    """Type 65 is the letter A: in lower case it would be type 97."""
    query = HEADER + EXAMPLE + b"\x00\x41\x00\x01"
    assert not dns_message.is_answer_to(response(query, EXAMPLE + b"\0\x61\0\1"), 0x1234, query, parsed(query))


@pytest.mark.parametrize("rcode", range(16))
def test_only_errors_may_lack_the_question(rcode: int) -> None:
    bare = response(QUERY, b"", rcode=rcode, count=b"\0\0")
    accepted = dns_message.is_answer_to(bare, 0x1234, QUERY, parsed(QUERY))
    assert accepted == (rcode in (Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED))


@given(NAMES.filter(lambda name: len(name) <= 255), TYPES, st.integers(0, 127), st.sampled_from(sorted(Rcode)))
def test_any_query_can_be_failed(name: bytes, kind: bytes, flags: int, rcode: Rcode) -> None:
    query = HEADER[:2] + bytes((flags,)) + HEADER[3:] + name + kind + b"\0\0\x29" + bytes(8)
    answer = dns_message.failure(query, rcode, parsed(query))
    assert dns_message.is_answer_to(answer, 0x1234, query, parsed(query))
    assert dns_message.rcode_of(answer) == rcode
    assert answer[HEADER_SIZE:] == name + kind
    assert len(dns_message.failure(query, rcode, None)) == HEADER_SIZE


def test_glibc_asks_elsewhere_after_the_same_errors() -> None:
    assert {rcode.name for rcode in ELSEWHERE} == {"SERVFAIL", "NOTIMP", "REFUSED"}

"""DNS messages as far as a forwarder has to understand them: the header and the question (RFC 1035, 4.1).

Everything behind the question passes untouched. What it holds is the business of the two ends, and a parser that never
looks at it cannot be led into a compression loop.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

HEADER_SIZE = 12
MAX_NAME = 255
"""RFC 1035, 3.1: octets of a name, with its length octets and the root."""
_MAX_LABEL = 63
_RESPONSE = 0x80
_OPCODE = 0x78
_OPCODE_AND_RD = 0x79
_RECURSION_AVAILABLE = 0x80
_ONE = b"\0\1"


class Rcode(enum.IntEnum):
    """Response codes of the header that the forwarder sends or looks at (RFC 1035, 4.1.1)."""

    FORMERR = 1
    SERVFAIL = 2
    NOTIMP = 4
    REFUSED = 5


_WITHOUT_QUESTION = frozenset(Rcode)
"""Errors that some servers report without repeating the question."""
ELSEWHERE = frozenset((Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED))
"""Answers that mean "ask another server" to the C library as well (res_send.c in glibc)."""


class Question(NamedTuple):
    """The one question of a message."""

    name: bytes
    """In wire form, in lower case."""
    type_and_class: bytes
    end: int
    """Where in the message it ends."""


def is_query(message: bytes) -> bool:
    """Whether this is a query. Answers sent to a server are dropped, or two servers could feed each other for ever."""
    return len(message) >= HEADER_SIZE and not message[2] & _RESPONSE


def question_of(message: bytes) -> Question | None:
    """The question of a message that has a header; None unless it has exactly one, well formed.

    More than one is an error by RFC 9619. The first name of a message has nothing before it to be compressed with.
    """
    if message[4:6] != _ONE:
        return None
    position = HEADER_SIZE
    size = len(message)
    while position < size:
        length = message[position]
        position += 1
        if not length:
            end = position + 4
            if end > size or position - HEADER_SIZE > MAX_NAME:
                return None
            # Length octets are at most 63, below the letter A, so that lower() leaves them alone.
            return Question(message[HEADER_SIZE:position].lower(), message[position:end], end)
        if length > _MAX_LABEL:
            return None
        position += length
    return None


def is_answer_to(message: bytes, identifier: int, query: bytes, question: Question) -> bool:
    """Whether this answers `query`, whose question is `question` and which was sent under the id `identifier`."""
    if len(message) < HEADER_SIZE or not message[2] & _RESPONSE or message_id(message) != identifier:
        return False
    if (message[2] ^ query[2]) & _OPCODE:
        return False
    if message[4:6] == _ONE and message[HEADER_SIZE : question.end] == query[HEADER_SIZE : question.end]:
        return True  # to the letter, as nearly always
    if message[4:8] == bytes(4):
        return rcode_of(message) in _WITHOUT_QUESTION
    start = question.end - 4
    return (
        message[4:6] == _ONE
        and message[start : question.end] == question.type_and_class
        and message[HEADER_SIZE:start].lower() == question.name
    )


def message_id(message: bytes) -> int:
    """The id of a message that has a header."""
    return int.from_bytes(message[:2], "big")


def rcode_of(message: bytes) -> int:
    """The response code in the header of a message that has one."""
    return message[3] & 0x0F


def with_id(message: bytes, identifier: int) -> bytes:
    """The message under another id (0..65535)."""
    return identifier.to_bytes(2, "big") + message[2:]


def failure(query: bytes, rcode: Rcode, question: Question | None) -> bytes:
    """An answer without records. Keeps the query's id and opcode, and its question unless that is malformed (None)."""
    flags = bytes(((query[2] & _OPCODE_AND_RD) | _RESPONSE, _RECURSION_AVAILABLE | rcode))
    counts = (_ONE if question else b"\0\0") + bytes(6)
    return query[:2] + flags + counts + (query[HEADER_SIZE : question.end] if question else b"")

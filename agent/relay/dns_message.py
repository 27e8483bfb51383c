"""The header of a DNS message (RFC 1035, 4.1.1), as far as a forwarder has to understand it."""

from __future__ import annotations

HEADER_SIZE = 12
_RESPONSE = 0x80
_OPCODE_AND_RD = 0x79
_RECURSION_AVAILABLE = 0x80
_SERVFAIL = 2


def is_query(message: bytes) -> bool:
    """Whether this is a query. Answers sent to a server are dropped, or two servers could feed each other for ever."""
    return len(message) >= HEADER_SIZE and not message[2] & _RESPONSE


def is_answer(message: bytes, identifier: int) -> bool:
    """Whether this answers the query with that id."""
    return len(message) >= HEADER_SIZE and bool(message[2] & _RESPONSE) and message_id(message) == identifier


def message_id(message: bytes) -> int:
    """The id of a message that has a header."""
    return int.from_bytes(message[:2], "big")


def with_id(message: bytes, identifier: int) -> bytes:
    """The message under another id (0..65535)."""
    return identifier.to_bytes(2, "big") + message[2:]


def _end_of_question(message: bytes) -> int | None:
    """Where the first question ends, or None when it is malformed. Names in a question are not compressed."""
    position = HEADER_SIZE
    while position < len(message):
        length = message[position]
        if length == 0:
            end = position + 5
            return end if end <= len(message) else None
        if length > 63:
            return None
        position += length + 1
    return None


def server_failure(query: bytes) -> bytes:
    """The answer SERVFAIL to a query: no name server could be reached. Keeps its id, opcode and question."""
    flags = bytes(((query[2] & _OPCODE_AND_RD) | _RESPONSE, _RECURSION_AVAILABLE | _SERVFAIL))
    end = _end_of_question(query) if query[4:6] == b"\0\1" else None
    counts = (b"\0\1" if end else b"\0\0") + b"\0\0\0\0\0\0"
    return query[:2] + flags + counts + (query[HEADER_SIZE:end] if end else b"")

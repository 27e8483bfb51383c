"""A zone the relay answers for itself: A and AAAA records of the names in it, and that there are no others."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tpctl.relay.dns.message import Question, Rcode, failure, question_of
from tpctl.relay.dns.vips import Vips

if TYPE_CHECKING:
    import dns.message
    import dns.name
    import dns.rrset

UDP_PAYLOAD = 1232
"""Octets that fit into one IPv6 packet on every link, the size DNS software agreed on in 2020 (dnsflagday.net)."""
UDP_PAYLOAD_WITHOUT_EDNS = 512
"""RFC 1035, 4.2.1."""
_MAX_MESSAGE = 65535
DEFAULT_TTL = 60
MAX_NEGATIVE_TTL = 10
"""Seconds a resolver may remember that there is no such name: one that is added to the file is found soon."""

_IN, _ANY_CLASS = 1, 255
_A, _NS, _SOA, _AAAA, _ANY = 1, 2, 6, 28, 255
_USUAL_TYPES = (_A, _AAAA, _SOA, _NS)
_META_TYPES = range(249, 255)
"""TKEY, TSIG, IXFR, AXFR, MAILB, MAILA: nothing that a name has (RFC 6895, 3.1)."""
_OPCODE = 0x78
_QUERY = bytes.fromhex("000001000001000000000001")
"""The header of a query with EDNS."""
_EDNS = bytes.fromhex("00002904d0000000000000")


class Addresses(NamedTuple):
    """The addresses of a name, as text."""

    v4: tuple[str, ...] = ()
    v6: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Zone:
    """A domain and its names. Names are in wire form, in lower case, as in `Question`."""

    origin: bytes
    names: Mapping[bytes, Addresses]
    ttl: int = DEFAULT_TTL
    vips: Vips = field(default_factory=Vips)
    _parents: frozenset[bytes] = field(init=False)
    """Names that exist only because others stand below them: NODATA, not NXDOMAIN (RFC 8020)."""
    _soa: dns.rrset.RRset = field(init=False)

    def __post_init__(self) -> None:
        parents = {self.origin}
        for name in self.names:
            while name != self.origin:
                name = parent(name)
                parents.add(name)
        object.__setattr__(self, "_parents", frozenset(parents))
        # A zone without secondaries: the number need not grow, only change (RFC 1035, 3.3.13).
        content = repr(sorted(self.names.items())).encode()
        object.__setattr__(self, "_soa", _soa(_text(self.origin), zlib.crc32(content), min(self.ttl, MAX_NEGATIVE_TTL)))

    def covers(self, name: bytes) -> bool:
        """Whether a name is the zone's or below it, and so must not be asked for elsewhere."""
        if not name.endswith(self.origin):
            return False
        # The octets may be the end of a longer label: look for the label that begins there.
        begin = len(name) - len(self.origin)
        position = 0
        while position < begin:
            position += name[position] + 1
        return position == begin

    def rehearse(self) -> None:
        """Build answers of the usual kinds once: for the first of each, dnspython reads modules from files.

        Later there may be no descriptors left for that.
        """
        for name, kind in itertools.product((next(iter(self.names), self.origin), self.origin), _USUAL_TYPES):
            query = _QUERY + name + kind.to_bytes(2, "big") + _IN.to_bytes(2, "big") + _EDNS
            question = question_of(query)
            assert question is not None
            self.answer(query, question, udp=True)

    def answer(self, query: bytes, question: Question, *, udp: bool) -> bytes:
        """The answer to a query for a name that the zone covers."""
        import dns.exception
        import dns.message

        if query[2] & _OPCODE:
            return failure(query, Rcode.NOTIMP, question)
        try:
            message = dns.message.from_wire(query)
        except dns.exception.DNSException:
            return failure(query, Rcode.FORMERR, question)
        response = dns.message.make_response(message, recursion_available=True, our_payload=UDP_PAYLOAD)
        self._fill(message, question, response)
        limit = _MAX_MESSAGE
        if udp:
            limit = UDP_PAYLOAD_WITHOUT_EDNS
            if message.edns >= 0:
                limit = max(limit, min(message.payload, UDP_PAYLOAD))
        return _to_wire(response, limit)

    def _fill(self, message: dns.message.Message, question: Question, response: dns.message.Message) -> None:
        import dns.flags
        import dns.rcode

        if message.edns >= 0 and message.ednsflags & dns.flags.DO:
            response.want_dnssec()  # RFC 3225, 3: the bit is copied even where nothing is signed
        kind = int.from_bytes(question.type_and_class[:2], "big")
        klass = int.from_bytes(question.type_and_class[2:], "big")
        if message.edns > 0:
            response.set_rcode(dns.rcode.BADVERS)
            return
        if klass not in (_IN, _ANY_CLASS) or kind in _META_TYPES:
            response.set_rcode(dns.rcode.REFUSED)
            return
        response.flags |= dns.flags.AA
        owner = message.question[0].name
        found = self._records(owner, question.name, kind)
        if found:
            response.answer.extend(found)
            return
        if question.name not in self.names and question.name not in self._parents:
            response.set_rcode(dns.rcode.NXDOMAIN)
        response.authority.append(self._soa)

    def _records(self, owner: dns.name.Name, name: bytes, kind: int) -> list[dns.rrset.RRset]:
        import dns.rrset

        found = []
        addresses = self.names.get(name, Addresses())
        for each, rdtype, texts in ((_A, "A", addresses.v4), (_AAAA, "AAAA", addresses.v6)):
            if kind in (each, _ANY) and texts:
                found.append(dns.rrset.from_text_list(owner, self.ttl, "IN", rdtype, texts))
        if name == self.origin:
            if kind in (_SOA, _ANY):
                found.append(self._soa)
            if kind in (_NS, _ANY):
                found.append(dns.rrset.from_text(owner, self.ttl, "IN", "NS", _text(self.origin)))
        return found


def _soa(origin: str, serial: int, ttl: int) -> dns.rrset.RRset:
    import dns.rrset

    # The names of a server and of a mailbox that do not exist, and the intervals, are those of RFC 6303, 3.
    rdata = f"{origin} nobody.invalid. {serial} 3600 1200 604800 {ttl}"
    return dns.rrset.from_text(origin, ttl, "IN", "SOA", rdata)


def parent(name: bytes) -> bytes:
    """The name without its first label; `name` is in wire form and not the root."""
    return name[name[0] + 1 :]


def _text(name: bytes) -> str:
    import dns.name

    return dns.name.from_wire(name, 0)[0].to_text()


def _to_wire(response: dns.message.Message, limit: int) -> bytes:
    """The message; truncated, with none of its records, when it is longer than `limit` octets."""
    import dns.exception
    import dns.flags

    try:
        return response.to_wire(max_size=limit)
    except dns.exception.TooBig:
        # Half a set of addresses would pass for the whole one: a client must ask over TCP (RFC 2181, 9).
        response.flags |= dns.flags.TC
        response.answer.clear()
        response.authority.clear()
        return response.to_wire(max_size=limit)

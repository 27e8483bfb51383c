"""Interfaces and addresses."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

from tpctl.host import interfaces
from tpctl.host.facts import LiveHost
from tpctl.host.interfaces import InterfaceAddress, parse_if_inet6
from tpctl.system import text

IF_INET6 = """\
fe8000000000000000fc00fffe000001 04 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
"""


def test_parse_if_inet6() -> None:
    assert list(parse_if_inet6(IF_INET6 + "junk\n")) == [
        InterfaceAddress(IPv6Address("fe80::fc:ff:fe00:1"), "eth0"),
        InterfaceAddress(IPv6Address("::1"), "lo"),
    ]
    assert list(parse_if_inet6("")) == []


def test_this_machine() -> None:
    host = LiveHost()
    loopback = host.loopback()
    assert loopback is not None
    assert interfaces.is_loopback(loopback)
    assert loopback in interfaces.names()
    assert not interfaces.is_loopback("none-such")
    for address, local in (("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("192.0.2.254", False)):
        assert host.is_local(ip_address(address)) is local


def test_names_of_interfaces_may_be_any_bytes() -> None:
    names = [b"x\xffy", b"a\x1cb", b'"q', b"u\xc2\x85z", b"l\xe2\x80\xa8s", b"$(id)", b"e\x1b[31m"]
    listing = b"".join(b"fd66%028x 01 40 00 80 %8s\n" % (number, name) for number, name in enumerate(names))
    found = list(parse_if_inet6(text.decoded(listing)))
    assert [text.encoded(one.interface) for one in found] == names

"""Interfaces and addresses."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, ip_address

from agent.host import interfaces
from agent.host.facts import LiveHost
from agent.host.interfaces import InterfaceAddress, parse_fib_trie, parse_if_inet6

IF_INET6 = """\
fe8000000000000000fc00fffe000001 04 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
"""
FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.0.0.0/8 2 0 2
        |-- 10.0.0.0
           /24 link UNICAST
        |-- 10.0.0.5
           /32 host LOCAL
        |-- 10.0.0.255
           /32 link BROADCAST
Local:
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.0
           /8 host LOCAL
        |-- 127.0.0.1
           /32 host LOCAL
"""


def test_parse_if_inet6() -> None:
    assert list(parse_if_inet6(IF_INET6 + "junk\n")) == [
        InterfaceAddress(IPv6Address("fe80::fc:ff:fe00:1"), "eth0"),
        InterfaceAddress(IPv6Address("::1"), "lo"),
    ]
    assert list(parse_if_inet6("")) == []


def test_parse_fib_trie() -> None:
    expected = ["10.0.0.5/32", "127.0.0.0/8", "127.0.0.1/32"]
    assert list(parse_fib_trie(FIB_TRIE)) == [IPv4Network(network) for network in expected]
    assert list(parse_fib_trie("")) == []


def test_this_machine() -> None:
    host = LiveHost()
    loopback = host.loopback()
    assert loopback is not None
    assert interfaces.is_loopback(loopback)
    assert loopback in interfaces.names()
    assert not interfaces.is_loopback("none-such")
    for text, local in (("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("192.0.2.254", False)):
        assert host.is_local(ip_address(text)) is local
    route = interfaces.route_to(ip_address("127.0.0.1"))
    assert route is not None
    assert (str(route.source), route.interface) == ("127.0.0.1", loopback)

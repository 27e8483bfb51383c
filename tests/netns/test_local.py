"""What is local: the same for the rules, for `tpctl explain`, for conntrack and for the check of resolvers.

The host of these tests has all that makes it hard to tell: a prefix that is local as a whole (AnyIP), a `local default`
to which only marked packets are sent, as transparent proxies have it, and policy routing.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.netns.lab import PROXY_USER, run, tpctl
from tpctl.host import routes
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, PEER, PEER_ADDRESS, Bridge, Layout
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root

CONTAINERS = ip_network("172.30.0.0/24")
LAYOUT = Layout(bridges=(Bridge("vnet0", (CONTAINERS,)),))
TPROXY = ("--kuma-dp-user", PROXY_USER, "--inbound-mode", "tproxy")
PROXYS_TABLE = (
    ("rule", "add", "fwmark", "0x77", "lookup", "100"),
    ("route", "add", "local", "default", "dev", "lo", "table", "100"),
)
LOCAL = {
    "127.0.0.1": True,
    "127.9.9.9": True,
    "198.19.255.2": True,
    "172.30.0.1": True,
    "10.9.3.4": True,  # AnyIP
    "10.8.0.1": True,  # added after the install
    "198.19.255.1": False,
    "198.19.255.255": False,  # broadcast
    "192.0.2.1": False,
    "10.66.0.1": False,  # a blackhole
    "::1": True,
    "fd74:7063:746c::2": True,
    "fd99::7": True,  # AnyIP
    "fd55::7": True,  # local by a table of its own: IPv6 is routed
    "fd74:7063:746c::1": False,
    "2001:db8::1": False,
}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(LAYOUT) as made:
        yield made
        with made.inside(HOST):
            tpctl("uninstall")


def ip(*words: str) -> None:
    run(["ip", *words])


def test_rules_and_questions_agree(lab: Lab) -> None:
    with lab.inside(HOST):
        own = ["127.0.0.1", "198.19.255.2", "198.19.255.1", "198.19.255.255", "fd74:7063:746c::2"]
        assert matched_by_rules(own) == {text for text in own if LOCAL[text]}  # without any rule of ip-rule(8)
        assert [routes.matches_local(ip_address(text)) for text in own] == [LOCAL[text] for text in own]
        tpctl("install", *TPROXY)
        for version in ("-4", "-6"):
            for words in PROXYS_TABLE:
                ip(version, *words)
        ip("route", "add", "local", "10.9.0.0/16", "dev", "lo")
        ip("route", "add", "blackhole", "10.66.0.0/16")
        ip("addr", "add", "10.8.0.1/32", "dev", "eth0")
        ip("-6", "route", "add", "local", "fd99::/64", "dev", "lo")
        for prefix, version in (("10.55.0.0/16", "-4"), ("fd55::/64", "-6")):
            ip(version, "rule", "add", "to", prefix, "lookup", "200")
            ip(version, "route", "add", "local", prefix, "dev", "lo", "table", "200")
        assert {text: routes.matches_local(ip_address(text)) for text in LOCAL} == LOCAL
        assert {text for text, local in LOCAL.items() if routes.is_local(ip_address(text)) is not local} == set()
        assert matched_by_rules([*LOCAL, "10.55.0.1"]) == {text for text, local in LOCAL.items() if local}
        for family in (socket.AF_INET, socket.AF_INET6):
            assert [(held.kind, held.prefix_length) for held in routes.of_table(family, 100)] == [(2, 0)]
            assert routes.of_table(family, 101) == []
        # What policy routing delivers here is answered here, though rules do not take it for local.
        assert routes.is_local(ip_address("10.55.0.1"))
        assert not routes.matches_local(ip_address("10.55.0.1"))


def matched_by_rules(addresses: list[str]) -> set[str]:
    """Those of which a packet that this host sends matches `fib daddr type local`."""
    rules = "".join(
        f'ip{"6" if ":" in address else ""} daddr {address} fib daddr type local counter comment "{address}"\n'
        for address in addresses
    )
    ruleset = f"table inet local {{ chain c {{ type filter hook output priority 0;\n{rules}}}\n}}\n"
    run(["nft", "-f", "-"], stdin=ruleset)
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            try:
                made.sendto(b"x", (address, 9))
            except OSError:
                assert routes.to_address(ip_address(address)) is None
    listing = run(["nft", "list", "table", "inet", "local"]).stdout
    run(["nft", "delete", "table", "inet", "local"])
    return {found[2] for found in re.finditer(r'packets (\d+).*comment "(.*)"', listing) if int(found[1])}


def test_explain_beside_the_routes_of_a_transparent_proxy(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl("install", *TPROXY)
        ip("route", "add", "local", "10.9.0.0/16", "dev", "lo")
        peer = str(PEER_ADDRESS[Family.IPV4])
        assert explained("inbound", "--from", peer, "--to", "192.0.2.7:80") == ("pass", "i0")
        assert explained("inbound", "--from", peer, "--to", "198.19.255.2:80") == ("redirect", "i7")
        assert explained("inbound", "--from", peer, "--to", "10.9.1.1:80") == ("redirect", "i7")
        assert explained("outbound", "--to", "192.0.2.7:80") == ("redirect", "o7")
        assert explained("outbound", "--to", "10.9.1.1:80") == ("pass", "o4")
        assert explained("outbound", "--from", peer, "--to", "127.0.0.1:80", "--uid", PROXY_USER) == ("pass", "t1")


def test_explain_takes_the_way_of_the_user_who_connects(lab: Lab) -> None:
    with lab.inside(HOST):
        tpctl("install", "--kuma-dp-user", PROXY_USER)
        ip("rule", "add", "uidrange", "1000-1000", "lookup", "300")
        ip("route", "add", "default", "dev", "vnet0", "table", "300")
        for uid, interface in (("1000", "vnet0"), ("1001", "eth0")):
            shown = tpctl("explain", "outbound", "--uid", uid, "--to", "192.0.2.7:80", "--json").stdout
            assert json.loads(shown)["connection"]["interface"] == interface


def explained(direction: str, *question: str) -> tuple[str, str]:
    answer = json.loads(tpctl("explain", direction, *question, "--json").stdout)
    return answer["action"], answer["rule"]


def test_a_resolver_elsewhere_does_not_loop(lab: Lab, tmp_path: Path) -> None:
    """In tproxy mode, too: the second install sees the routes of the first."""
    resolv_conf = tmp_path / "resolv.conf"
    flags = (*TPROXY, "--redirect-all-dns-traffic", "--resolv-conf", str(resolv_conf))
    with lab.inside(HOST):
        resolv_conf.write_text("nameserver 192.0.2.53\n")
        tpctl("install", *flags)
        tpctl("install", *flags, "--exclude-inbound-ports", "22")
        ip("rule", "add", "to", "10.55.0.0/16", "lookup", "200")
        ip("route", "add", "local", "10.55.0.0/16", "dev", "lo", "table", "200")
        resolv_conf.write_text("nameserver 10.55.0.1\n")  # answered by this host
        refused = tpctl("install", *flags, check=False)
    assert refused.returncode == 2
    assert "names 10.55.0.1, a resolver on this host" in refused.stderr


FIREWALL = """
table inet fw {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "vnet0" tcp flags & (syn|ack) == syn ct state new accept
  }
}
"""


@pytest.mark.parametrize("mode", ["tproxy", "redirect"])
@pytest.mark.parametrize("whose", ["tpctl", "another"])
def test_an_install_leaves_connections_alone_that_are_only_forwarded(lab: Lab, whose: str, mode: str) -> None:
    """A stateful firewall drops what conntrack has forgotten, so they would hang."""
    with lab.inside(HOST):
        run(["nft", "-f", "-"], stdin=FIREWALL)
        if whose == "tpctl":
            tpctl("install", *TPROXY)
        else:
            for words in PROXYS_TABLE:
                ip(*words)
    with echoing(lab, PEER) as address:
        with lab.inside("vnet0"):
            client = socket.create_connection(address, timeout=60)
        client.sendall(b"1")
        assert client.recv(1) == b"1"
        with lab.inside(HOST):
            tpctl("install", "--kuma-dp-user", PROXY_USER, "--inbound-mode", mode, "--exclude-inbound-ports", "22")
        client.sendall(b"2")
        assert client.recv(1) == b"2"
        client.close()


@contextmanager
def echoing(lab: Lab, node: str) -> Iterator[tuple[str, int]]:
    """The address of a server that sends back what it gets, to one client."""
    with lab.inside(node):
        listener = socket.create_server((str(PEER_ADDRESS[Family.IPV4]), 9000))

    def serve() -> None:
        made, _ = listener.accept()
        with made:
            while received := made.recv(100):
                made.sendall(received)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with closing(listener):
        yield str(PEER_ADDRESS[Family.IPV4]), 9000
        thread.join()

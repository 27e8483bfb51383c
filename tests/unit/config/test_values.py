"""Readers of single values: what they accept, and that they say no clearly."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.config import traffic, values
from tpctl.config.values import BadValueError, Reader
from tpctl.spec.policy import ALL_PORTS, MAX_UID, PortRange, Protocol, UidExclusion, UidRange, VirtualNetwork

ports = st.integers(1, 65535)
port_ranges = st.tuples(ports, ports).map(lambda pair: PortRange(min(pair), max(pair)))
uids = st.integers(0, MAX_UID)
uid_ranges = st.tuples(uids, uids).map(lambda pair: UidRange(min(pair), max(pair)))


def silent(text: str) -> None:
    """A note that must not be made."""
    raise AssertionError(text)


@given(st.lists(port_ranges, unique=True))
def test_ports_read_back_what_they_print(ranges: list[PortRange]) -> None:
    assert traffic.read_ports(",".join(map(str, ranges)), silent) == tuple(ranges)
    assert traffic.read_ports([str(one) for one in ranges], silent) == tuple(ranges)


@given(st.sampled_from(Protocol), st.lists(port_ranges, min_size=1, max_size=5, unique=True), uid_ranges)
def test_uid_exclusions_read_back_what_they_print(protocol: Protocol, some: list[PortRange], who: UidRange) -> None:
    rule = UidExclusion(protocol, tuple(some), who)
    assert traffic.read_uid_exclusions([str(rule)], silent) == (rule,)
    assert traffic.read_uid_exclusions(f"{rule};{rule}", silent) == (rule,)


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_networks_read_back_what_they_print(address: IPv4Address, length: int) -> None:
    network = IPv4Network((address, length), strict=False)
    assert traffic.read_networks(str(network), silent) == (network,)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_with_a_reason(text: str) -> None:
    readers: list[Reader] = [
        values.read_bool, values.read_text, values.read_port, traffic.read_ports, traffic.read_networks,
        traffic.read_virtual_networks, traffic.read_uid_exclusions, values.read_duration, values.read_executables,
    ]  # fmt: skip
    for read in readers:
        problems: tuple[str, ...] = ("none",)
        try:
            read(text, lambda note: None)
        except BadValueError as bad:
            problems = bad.problems
        assert problems
        assert all(problems)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (15006, 15006),
        ("15006", 15006),
        (" 15006 ", 15006),
        (1, 1),
        (65535, 65535),
    ],
)
def test_port(raw: object, expected: int) -> None:
    assert values.read_port(raw, silent) == expected


@pytest.mark.parametrize("raw", [0, 65536, "0", "65536", "8o", "", "-1", -1, True, 80.0, None, [80], "1" * 5000, "٨"])
def test_no_port(raw: object) -> None:
    with pytest.raises(BadValueError, match="is not a port"):
        values.read_port(raw, silent)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("80", (PortRange(80),)),
        (80, (PortRange(80),)),
        ("80,443,1000-2000", (PortRange(80), PortRange(443), PortRange(1000, 2000))),
        ([80, "443", "1-3, 9"], (PortRange(80), PortRange(443), PortRange(1, 3), PortRange(9))),
        ("80,80", (PortRange(80),)),
        ("", ()),
        ([], ()),
    ],
)
def test_ports(raw: object, expected: object) -> None:
    assert traffic.read_ports(raw, silent) == expected


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("20-10", "reversed; write 10-20"),
        ("0-10", "not within the ports"),
        ("1-65536", "not within the ports"),
        ("1-2-3", "is not a port"),
        ("8o", '"8o" is not a port'),
        ("-5", "is not a port"),
        ([True], "True is not a port"),
        ({"a": 1}, "is not a port"),
    ],
)
def test_bad_ports(raw: object, problem: str) -> None:
    with pytest.raises(BadValueError, match=problem):
        traffic.read_ports(raw, silent)


def test_every_bad_item_is_reported() -> None:
    with pytest.raises(BadValueError) as caught:
        traffic.read_ports("8o,70000,80,9-1", silent)
    assert len(caught.value.problems) == 3


def test_host_bits_are_cleared_with_a_note() -> None:
    notes: list[str] = []
    assert traffic.read_networks("172.32.16.8/16, fd00::1/64", notes.append) == (
        IPv4Network("172.32.0.0/16"),
        IPv6Network("fd00::/64"),
    )
    assert [note.rpartition(" ")[2] for note in notes] == ["172.32.0.0/16", "fd00::/64"]


def test_an_address_alone_is_a_network_of_one() -> None:
    assert traffic.read_networks(["10.0.0.1", "fd00::1"], silent) == (
        IPv4Network("10.0.0.1/32"),
        IPv6Network("fd00::1/128"),
    )


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("::ffff:10.0.0.1", "write 10.0.0.1"),
        ("::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
        ("10.0.0.0/33", "is not an IP address"),
        ("10.0.0.0/64", "is not an IP address"),
        ("10.0.0.256", "is not an IP address"),
        ("10.0.0.0/", "is not an IP address"),
        ("10.0.0.0/255.0.0.0", "is not an IP address"),
        ("fe80::1%eth0", "is not an IP address"),
        ("example.org", "is not an IP address"),
        (10, "is not an IP address"),
        (["10.0.0.1", ""], '"" is not an IP address'),
    ],
)
def test_bad_networks(raw: object, problem: str) -> None:
    with pytest.raises(BadValueError, match=problem):
        traffic.read_networks(raw, silent)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("docker0:172.17.0.0/16", VirtualNetwork("docker0", IPv4Network("172.17.0.0/16"))),
        ("br+:172.18.0.0/16", VirtualNetwork("br+", IPv4Network("172.18.0.0/16"))),
        ("iface:fd00::/64", VirtualNetwork("iface", IPv6Network("fd00::/64"))),
        ("iface:::/64", VirtualNetwork("iface", IPv6Network("::/64"))),
        ("fifteen-letters:10.0.0.0/8", VirtualNetwork("fifteen-letters", IPv4Network("10.0.0.0/8"))),
    ],
)
def test_virtual_network(raw: str, expected: VirtualNetwork) -> None:
    assert traffic.read_virtual_networks(raw, silent) == (expected,)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("docker0", "is not a virtual network"),
        ("docker0:", "is not a virtual network"),
        (":10.0.0.0/8", "name of an interface"),
        ("+:10.0.0.0/8", "name of an interface"),
        ("a b:10.0.0.0/8", "name of an interface"),
        ("a/b:10.0.0.0/8", "name of an interface"),
        ("sixteen-letters+:10.0.0.0/8", "longer than 15"),
        ("docker0:ten", "is not an IP address"),
        ("docker0:::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
    ],
)
def test_bad_virtual_network(raw: str, problem: str) -> None:
    with pytest.raises(BadValueError, match=problem):
        traffic.read_virtual_networks(raw, silent)


TCP, UDP = Protocol.TCP, Protocol.UDP


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("1000", [(TCP, (ALL_PORTS,), UidRange(1000)), (UDP, (ALL_PORTS,), UidRange(1000))]),
        (1000, [(TCP, (ALL_PORTS,), UidRange(1000)), (UDP, (ALL_PORTS,), UidRange(1000))]),
        ("53:1000", [(TCP, (PortRange(53),), UidRange(1000)), (UDP, (PortRange(53),), UidRange(1000))]),
        ("udp:53:106-108", [(UDP, (PortRange(53),), UidRange(106, 108))]),
        ("udp,tcp:*:0", [(TCP, (ALL_PORTS,), UidRange(0)), (UDP, (ALL_PORTS,), UidRange(0))]),
        ("*::1", [(TCP, (ALL_PORTS,), UidRange(1)), (UDP, (ALL_PORTS,), UidRange(1))]),
        ("tcp:22,80-90:4294967294", [(TCP, (PortRange(22), PortRange(80, 90)), UidRange(MAX_UID))]),
    ],
)
def test_uid_exclusion(raw: object, expected: list[tuple[Protocol, tuple[PortRange, ...], UidRange]]) -> None:
    assert traffic.read_uid_exclusion(raw, silent) == tuple(UidExclusion(*parts) for parts in expected)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("", "is not an exclusion"),
        (None, "is not an exclusion"),
        ("a:b:c:d", "too many parts"),
        ("tcp:1000", "is in the place of the ports"),
        ("sctp:53:1000", '"sctp" is not a protocol'),
        ("udp:8o:1000", '"8o" is not a port'),
        ("udp:53,:1000", "empty item"),
        ("udp:20-10:1000", "reversed"),
        ("udp:53:*", "not allowed for uids"),
        ("udp:53:app", "is not a uid"),
        ("udp:53:1-2-3", "is not a uid"),
        ("udp:53:", "is not a uid"),
        ("udp:53:4294967295", "not within the uids"),
        ("udp:53:9-1", "reversed; write 1-9"),
    ],
)
def test_bad_uid_exclusion(raw: object, problem: str) -> None:
    with pytest.raises(BadValueError, match=problem):
        traffic.read_uid_exclusion(raw, silent)


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        ("2s", 2),
        ('"2s"', 2),
        ("500ms", 0.5),
        ("1m", 60),
        ("1m30.5s", 90.5),
        ("0", 0),
        (2_000_000_000, 2),
        (".5h", 1800),
    ],
)
def test_duration(raw: object, seconds: float) -> None:
    assert values.read_duration(raw, silent) == seconds


def test_a_bare_small_number_is_nanoseconds_with_a_note() -> None:
    notes: list[str] = []
    assert values.read_duration("2", notes.append) == 2e-9
    assert "write 2s" in notes[0]


@pytest.mark.parametrize("raw", ["", "2 s", "s", "-2s", -2, None, "2days", True, 1.5])
def test_bad_duration(raw: object) -> None:
    with pytest.raises(BadValueError, match="is not a duration"):
        values.read_duration(raw, silent)


@pytest.mark.parametrize("text", sorted(values.TRUE | values.FALSE))
def test_truth_values_of_go(text: str) -> None:
    assert values.read_bool(text, silent) is (text in values.TRUE)


@pytest.mark.parametrize("raw", ["yes", "tRUE", "", 1, 0, None])
def test_bad_truth_value(raw: object) -> None:
    with pytest.raises(BadValueError, match="neither true nor false"):
        values.read_bool(raw, silent)


def test_executables() -> None:
    expected = {"iptables": "/sbin/iptables", "iptables-save": "/x:y"}
    assert values.read_executables("iptables:/sbin/iptables,iptables-save:/x:y", silent) == expected
    assert values.read_executables({**expected, "ip6tables": None}, silent) == expected


@pytest.mark.parametrize("raw", ["iptable:/x", "iptables", "iptables:", {"iptables": 5}, 5])
def test_bad_executables(raw: object) -> None:
    with pytest.raises(BadValueError):
        values.read_executables(raw, silent)


def test_choice_and_number() -> None:
    assert values.Choice("dualstack", "ipv4")("IPv4", silent) == "ipv4"
    assert values.Number(0, 7)("7", silent) == 7
    for read, raw in ((values.Choice("a", "b"), "c"), (values.Choice("a", "b"), 1), (values.Number(0, 7), 8)):
        with pytest.raises(BadValueError):
            read(raw, silent)


def test_ipv6_mapped_prefixes_below_96_are_ordinary_networks() -> None:
    assert traffic.read_network("::/0", silent) == IPv6Network("::/0")
    assert IPv6Address("::6") in traffic.read_network("::/64", silent)


@pytest.mark.parametrize(
    ("read", "raw", "expected"),
    [
        (traffic.read_ports, "22,80,", "22 80"),
        (traffic.read_ports, ",22", "22"),
        (traffic.read_ports, "80, ,443", "80 443"),
        (traffic.read_ports, ",", ""),
        (traffic.read_ports, [22, ""], "22"),
        (traffic.read_ports, ["22,", "80"], "22 80"),
        (traffic.read_networks, "10.0.0.1,,fd00::/8", "10.0.0.1/32 fd00::/8"),
        (traffic.read_networks, ["10.0.0.1,", "10.0.0.2"], "10.0.0.1/32 10.0.0.2/32"),
        (traffic.read_uid_exclusions, "tcp,:53:1000", "tcp:53:1000"),
        (values.read_executables, "iptables:/x,", "iptables"),
    ],
)
def test_empty_items_are_left_out_with_a_note_where_kumactl_leaves_them_out(
    read: values.Reader, raw: object, expected: str
) -> None:
    notes: list[str] = []
    found = read(raw, notes.append)
    assert isinstance(found, Iterable)
    assert " ".join(map(str, found)) == expected
    (note,) = notes
    assert "has an empty item, which is skipped, as by kumactl" in note


@pytest.mark.parametrize("cidr", ["172.17.0.1", "fd00::1", "172.17.0.0"])
def test_a_virtual_network_needs_its_length(cidr: str) -> None:
    with pytest.raises(BadValueError, match=f"has no length.*docker0:{cidr}/"):
        traffic.read_virtual_networks(f"docker0:{cidr}", silent)


@pytest.mark.parametrize("raw", ["docker0:172.17.0.0/16,", ["docker0:172.17.0.0/16", ""], ","])
def test_an_empty_virtual_network_is_refused_as_by_kumactl(raw: object) -> None:
    with pytest.raises(BadValueError, match="empty item"):
        traffic.read_virtual_networks(raw, silent)


def test_a_user_of_blanks_is_none() -> None:
    assert (values.read_user("", silent), values.read_user(" app ", silent), values.read_user(5678, silent)) == (
        "", "app", "5678",
    )  # fmt: skip
    for nobody in (" ", "a\nb", "a\x1bb"):
        with pytest.raises(BadValueError, match="neither the name nor the uid"):
            values.read_user(nobody, silent)


def test_the_name_of_a_user_may_be_no_utf8() -> None:
    assert values.read_user("us\udce9r", silent) == "us\udce9r"

"""The local zone in a running relay: dig asks for its names, and connections to its virtual addresses arrive."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.dns_net import PEER_SECOND, answer_to, dig, name_server, readable, relay_for
from tests.netns.relay.net import PEER4, PEER6, Net, Relay, Server, say_who

pytestmark = pytest.mark.root

ZONE = f"""
names:
  db.mesh:
    addresses: [240.0.0.1, "fd00:240::1"]
    upstreams: ["{PEER4}:5432", "{PEER_SECOND}:5432"]
  web.mesh:
    addresses: 240.0.0.2
    upstreams:
      80: "[{PEER6}]:8080"
  plain.mesh: {PEER4}
  many.mesh: [{", ".join(f"10.1.0.{number}" for number in range(1, 201))}]
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with dns_net.network() as network:
        relay_net.run("ip", "-n", network.host, "route", "add", "default", "via", PEER4)
        relay_net.run("ip", "-n", network.host, "-6", "route", "add", "default", "via", PEER6)
        yield network


@pytest.fixture
def zone_file(tmp_path: Path) -> Iterator[Path]:
    path = readable(tmp_path, "zone.yaml", ZONE)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def relay(net: Net, tmp_path: Path, zone_file: Path) -> Iterator[Relay]:
    with relay_for(net, tmp_path, PEER4, options=("--dns-zone-file", str(zone_file))) as (_, running):
        yield running


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_names_of_the_zone_are_answered_and_never_forwarded(net: Net, relay: Relay, transport: str) -> None:
    with name_server(net, PEER4, lambda message: [answer_to(message, 1)]) as server:
        assert dig(net, transport, "+short", "DB.Mesh").split() == ["240.0.0.1"]
        assert dig(net, transport, "+short", "db.mesh", "AAAA").split() == ["fd00:240::1"]
        missing = dig(net, transport, "none.db.mesh")
        assert "status: NXDOMAIN" in missing
        assert "IN\tSOA\tmesh. nobody.invalid." in missing
        nodata = dig(net, transport, "web.mesh", "AAAA")
        assert "status: NOERROR" in nodata
        assert "ANSWER: 0, AUTHORITY: 1" in nodata
        secure = dig(net, transport, "+dnssec", "db.mesh")
        assert "flags: do; udp: 1232" in secure
        assert "flags: qr aa rd ra;" in secure
        assert server.seen == []
        if transport == "+notcp":
            assert dig(net, "+noedns", "+short", "example.com").split() == ["203.0.113.1"], (
                "everything else is forwarded"
            )
            assert len(server.seen) == 1


def test_a_long_answer_is_truncated_and_then_fetched_over_tcp(net: Net, relay: Relay) -> None:
    assert "tc" in dig(net, "+ignore", "many.mesh").split("flags:")[1].split(";")[0].split()
    assert len(dig(net, "+short", "many.mesh").splitlines()) == 200


def who_answers(net: Net, address: tuple[str, int], patience: float = relay_net.TIMEOUT) -> tuple[str, str, int]:
    with net.connect(net.host, address) as client:
        client.settimeout(patience)
        name, _, host, port = json.loads(relay_net.read_all(client))
        return name, host, port


@pytest.fixture
def services(net: Net) -> Iterator[None]:
    places = {"first": (PEER4, 5432), "second": (PEER_SECOND, 5432), "web": (PEER6, 8080), "direct": (PEER4, 80)}
    servers = [Server(net.listen(net.peer, place), say_who(name)) for name, place in places.items()]
    yield
    for server in servers:
        server.close()


@pytest.mark.usefixtures("relay", "services")
def test_connections_to_virtual_addresses_reach_their_upstreams(net: Net) -> None:
    for address in ("240.0.0.1", "fd00:240::1"):
        reached = [who_answers(net, (address, 5432)) for _ in range(4)]
        assert sorted(reached) == [("first", PEER4, 5432)] * 2 + [("second", PEER_SECOND, 5432)] * 2
    assert who_answers(net, ("240.0.0.2", 80)) == ("web", PEER6, 8080), "IPv4 in front, IPv6 behind"
    assert who_answers(net, (PEER4, 80)) == ("direct", PEER4, 80), "other addresses are dialled as they are"


@pytest.mark.usefixtures("services")
def test_a_port_without_an_upstream_is_refused(net: Net, relay: Relay) -> None:
    with pytest.raises(ConnectionResetError), net.connect(net.host, ("240.0.0.2", 81)) as client:
        client.recv(1)
    assert relay.wait_for("refused: a virtual address that has no upstream")["destination"] == "240.0.0.2:81"


@pytest.mark.usefixtures("relay")
def test_an_upstream_that_is_down_is_passed_over(net: Net) -> None:
    server = Server(net.listen(net.peer, (PEER_SECOND, 5432)), say_who("second"))
    try:
        assert {who_answers(net, ("240.0.0.1", 5432))[0] for _ in range(4)} == {"second"}
    finally:
        server.close()


def test_an_upstream_that_is_silent_is_passed_over_when_its_time_is_over(net: Net) -> None:
    """With ten of them before it, the one that answers would have its turn after half a minute by default."""
    silent = ("INPUT", "-p", "tcp", "--dport", "7100:7109", "-j", "DROP")
    on_peer = ("nsenter", f"--net=/run/netns/{net.peer}", "iptables", "-w")
    relay_net.run(*on_peer, "-A", *silent)
    server = Server(net.listen(net.peer, (PEER_SECOND, 5432)), say_who("second"))
    try:
        with relay_net.public_directory() as directory:
            upstreams = [*(f"{PEER4}:{port}" for port in range(7100, 7110)), f"{PEER_SECOND}:5432"]
            (directory / "zone.yaml").write_text(
                f"names: {{a.mesh: {{addresses: 240.0.0.9, upstreams: {json.dumps(upstreams)}}}}}"
            )
            (directory / "relay.yaml").write_text(
                f"dns: {{zone_file: {directory}/zone.yaml}}\ntimeouts: {{connect: 100ms}}\n"
                "listeners: [{listen: '[::]:15001 ipv6only=off', direction: outbound}]\n"
            )
            with relay_net.relay(net, directory, "--config", str(directory / "relay.yaml")):
                assert who_answers(net, ("240.0.0.9", 5432), 20.0)[0] == "second"
    finally:
        server.close()
        relay_net.run(*on_peer, "-D", *silent)


def addresses(net: Net, name: str) -> list[str]:
    return dig(net, "+short", name).split()


@pytest.mark.usefixtures("services")
def test_changes_of_the_file_are_followed_and_bad_ones_are_not(net: Net, relay: Relay, zone_file: Path) -> None:
    assert addresses(net, "new.mesh") == []
    zone_file.write_text(f'{ZONE}  new.mesh: {{addresses: 240.0.0.3, upstreams: "{PEER4}:80"}}\n')
    relay_net.until(lambda: addresses(net, "new.mesh") == ["240.0.0.3"])
    assert who_answers(net, ("240.0.0.3", 99)) == ("direct", PEER4, 80)
    assert relay.wait_for("the DNS zone has been reloaded")["names"] == 5

    zone_file.write_text("names: {new.mesh: 1.2.3, other.example: 10.0.0.1}")
    rejected = relay.wait_for("the DNS zone file is unusable; the previous one stays")
    assert len(rejected["problems"]) == 2
    assert addresses(net, "new.mesh") == ["240.0.0.3"]

    replacement = zone_file.with_suffix(".new")
    replacement.write_text("names: {new.mesh: 240.0.0.4}")
    os.replace(replacement, zone_file)  # noqa: PTH105 - as an editor does it
    relay_net.until(lambda: addresses(net, "new.mesh") == ["240.0.0.4"])
    assert addresses(net, "db.mesh") == []

    zone_file.unlink()
    relay_net.until(
        lambda: sum(line["event"].startswith("the DNS zone file is unusable") for line in relay.lines()) == 2
    )
    assert addresses(net, "new.mesh") == ["240.0.0.4"]


def test_a_hosts_file_with_a_domain_of_ones_own(net: Net, tmp_path: Path) -> None:
    path = readable(tmp_path, "hosts", "10.9.8.7 db.prod.internal db2.prod.internal\n")
    try:
        options = ("--dns-zone-file", str(path), "--dns-zone", "Prod.Internal", "--workers", "2")
        with relay_for(net, tmp_path, PEER4, options=options):
            assert addresses(net, "db2.prod.internal") == ["10.9.8.7"]
            with name_server(net, PEER4, lambda message: [answer_to(message, 1)]):
                assert dig(net, "+noedns", "+short", "example.com").split() == ["203.0.113.1"]
    finally:
        path.unlink()


@pytest.mark.parametrize("options", [(), ("--workers", "2"), ("--check-config",)])
def test_a_bad_file_is_said_before_anything_starts(net: Net, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = readable(tmp_path, "hosts", "10.9.8.7 db.other\n")
    try:
        relay = Relay(net, tmp_path, "--dns-zone-file", str(path), *options, user=None)
        assert relay.exit_code() == 2
        said = next(tmp_path.glob("relay-*.log")).read_text()
        assert f"DNS zone file {path}: line 1: db.other is not a name in the zone mesh" in said
        assert "Traceback" not in said
    finally:
        path.unlink()


@pytest.mark.usefixtures("relay")
def test_the_case_the_client_drew_comes_back(net: Net) -> None:
    """Resolvers that draw the case of a name at random compare it (draft-vixie-dnsext-dns0x20)."""
    with net.datagram(net.host, socket.AF_INET) as client:
        client.connect((PEER4, 53))
        for name in (b"\x02dB\x04mEsh\x00", b"\x02Db\x04MESh\x00"):
            client.send(dns_net.query(5, name + b"\0\1\0\1"))
            assert client.recv(512)[12 : 12 + len(name)] == name

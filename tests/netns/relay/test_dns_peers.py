"""The relay's DNS between real programs: dig and glibc ask, dnsmasq answers, packets get lost."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dns.edns
import dns.flags
import dns.message
import dns.rrset
import pytest

from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.dns_net import (
    PEER_SECOND,
    SERVFAIL,
    SOON,
    answer_to,
    ask,
    dig,
    dnsmasq,
    drained,
    name_server,
    query,
    relay_for,
)
from tests.netns.relay.net import HOST4, PEER4, Net
from tests.netns.relay.test_operation import scrape
from tpctl.relay.dns.forwarder import MAX_GUESSES

pytestmark = pytest.mark.root

LONG = [f"--txt-record=long.test,{number:03}{'x' * 200}" for number in range(15)]
RECORDS = ("--host-record=db.test,192.0.2.7,2001:db8::7", "--cname=www.test,db.test", *LONG)


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with dns_net.network() as network:
        yield network


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """A network with a dnsmasq that a relay forwards to."""
    directory = tmp_path_factory.mktemp("relay")
    with dns_net.network() as network, dnsmasq(network, *RECORDS), relay_for(network, directory, PEER4):
        yield network


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
@pytest.mark.parametrize("edns", ["+edns=0", "+noedns"])
def test_dig_gets_what_dnsmasq_has(asked: Net, transport: str, edns: str) -> None:
    assert dig(asked, transport, edns, "+short", "db.test", "A").split() == ["192.0.2.7"]
    assert dig(asked, transport, edns, "+short", "DB.test", "AAAA").split() == ["2001:db8::7"]
    assert dig(asked, transport, edns, "+short", "www.test").split() == ["db.test.", "192.0.2.7"]
    assert "status: NXDOMAIN" in dig(asked, transport, edns, "none.test")


def test_glibc_resolves_through_the_relay(asked: Net, tmp_path: Path) -> None:
    code = "import socket; print(socket.gethostbyname('db.test'))"
    script = f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && /usr/bin/python3 -c "{code}"'
    (tmp_path / "resolv.conf").write_text(f"nameserver {PEER4}\n")
    assert asked.on_host("unshare", "--mount", "sh", "-c", script).strip() == "192.0.2.7"


@pytest.mark.parametrize(("options", "size"), [(["+noedns"], 512), (["+bufsize=1232"], 1232)])
def test_a_truncated_answer_is_passed_on_and_the_client_comes_over_tcp(
    asked: Net, options: list[str], size: int
) -> None:
    cut = dig(asked, *options, "+ignore", "long.test", "TXT")
    assert " tc " in cut.split("flags:")[1].split(";")[0] + " "
    assert int(cut.split("MSG SIZE  rcvd: ")[1].split()[0]) <= size
    whole = dig(asked, *options, "long.test", "TXT")
    assert whole.count('IN\tTXT\t"') == len(LONG)
    assert "(TCP)" in whole


def test_a_large_answer_passes_over_udp_when_the_client_can_take_it(asked: Net) -> None:
    whole = dig(asked, "+bufsize=4096", "+notcp", "+ignore", "long.test", "TXT")
    assert whole.count('IN\tTXT\t"') == len(LONG)
    assert "(UDP)" in whole


def test_many_queries_on_one_tcp_connection(asked: Net) -> None:
    names = ["db.test", "www.test", "none.test", "long.test"] * 30
    with asked.connect(asked.host, (PEER4, 53)) as client:
        messages = [dns.message.make_query(name, "A", id=number) for number, name in enumerate(names)]
        client.sendall(b"".join(dns_net.framed(message.to_wire()) for message in messages))
        answers = [dns.message.from_wire(dns_net.read_framed(client)) for _ in names]
    by_id = {answer.id: answer for answer in answers}
    for message in messages:
        assert message.is_response(by_id[message.id])
        assert bool(by_id[message.id].answer) == (message.question[0].name.to_text() in ("db.test.", "www.test."))


def test_edns_passes_untouched_both_ways(net: Net, tmp_path: Path) -> None:
    """The DNSSEC OK bit, sizes, and options nobody here knows."""
    received: list[dns.message.Message] = []

    def serve(message: bytes) -> list[bytes]:
        parsed = dns.message.from_wire(message)
        received.append(parsed)
        response = dns.message.make_response(parsed)
        response.use_edns(0, dns.flags.DO, 1400, options=[dns.edns.GenericOption("65001", b"answer")])
        response.flags |= dns.flags.AD
        response.answer.append(dns.rrset.from_text("example.com.", 60, "IN", "A", "203.0.113.1"))
        return [response.to_wire()]

    with name_server(net, PEER4, serve), relay_for(net, tmp_path, PEER4):
        said = dig(net, "+dnssec", "+bufsize=1399", "+ednsopt=65001:6162", "+subnet=192.0.2.0/24", "example.com")
    [message] = received
    assert (message.edns, message.payload, message.ednsflags) == (0, 1399, dns.flags.DO)
    assert {option.otype for option in message.options} == {65001, dns.edns.OptionType.ECS}
    assert "flags: do; udp: 1400" in said
    assert "OPT=65001: 61 6e 73 77 65 72" in said
    assert " ad" in said.split("flags:")[1].split(";")[0]


def test_a_dead_first_server_costs_one_query_its_timeout_and_not_the_next(net: Net, tmp_path: Path) -> None:
    with (
        dnsmasq(net, *RECORDS, address=PEER_SECOND),
        name_server(net, PEER4, lambda _message: []) as silent,
        relay_for(net, tmp_path, PEER4, PEER_SECOND, resolv_options="options timeout:3\n"),
    ):
        started = time.monotonic()
        assert dig(net, "+short", "db.test").split() == ["192.0.2.7"]
        assert time.monotonic() - started > 2.9
        for _ in range(5):
            assert dig(net, "+short", "www.test").split() == ["db.test.", "192.0.2.7"]
        assert len(silent.seen) == 1


@contextlib.contextmanager
def loss(net: Net, statement: str) -> Iterator[None]:
    """Queries that reach the peer and match the statement are lost."""
    table = f"""table ip loss {{
        chain input {{
            type filter hook input priority 0;
            udp dport 53 {statement} counter drop
        }}
    }}"""
    on_peer = ("nsenter", f"--net=/run/netns/{net.peer}", "nft")
    relay_net.run(*on_peer, "-f", "-", stdin=table)
    try:
        yield
        assert " packets 0 " not in relay_net.run(*on_peer, "list", "table", "ip", "loss")
    finally:
        relay_net.run(*on_peer, "delete", "table", "ip", "loss")


def test_a_lost_query_is_sent_again(net: Net, tmp_path: Path) -> None:
    """Every other one is lost, beginning with the first."""
    with (
        dnsmasq(net, *RECORDS),
        relay_for(net, tmp_path, PEER4, resolv_options="options timeout:1 attempts:3\n"),
        loss(net, "numgen inc mod 2 0"),
    ):
        for _ in range(3):
            assert dig(net, "+short", "db.test").split() == ["192.0.2.7"]


def test_many_queries_and_a_third_lost(net: Net, tmp_path: Path) -> None:
    """Each is sent five times at most, so that one in 243 may fail; all have an answer."""
    records = [f"--host-record=n{number}.test,192.0.2.{number}" for number in range(100)]
    queries = [dns.message.make_query(f"n{number}.test", "A", id=number) for number in range(100)]
    with (
        dnsmasq(net, *records),
        relay_for(net, tmp_path, PEER4, resolv_options="options timeout:1 attempts:5\n"),
        loss(net, "numgen random mod 3 0"),
        net.datagram(net.host, socket.AF_INET) as client,
    ):
        client.connect((PEER4, 53))
        for message in queries:
            client.send(message.to_wire())
        answers = [dns.message.from_wire(client.recv(4096)) for _ in queries]
    resolved = [answer for answer in answers if answer.answer]
    assert {answer.id for answer in answers} == set(range(100))
    assert all(str(answer.answer[0][0]) == f"192.0.2.{answer.id}" for answer in resolved)
    assert len(resolved) > 90


def test_servers_take_turns_where_resolv_conf_says_so(net: Net, tmp_path: Path) -> None:
    with (
        name_server(net, PEER4, lambda message: [answer_to(message, 1)]) as first,
        name_server(net, PEER_SECOND, lambda message: [answer_to(message, 2)]) as second,
        relay_for(net, tmp_path, PEER4, PEER_SECOND, resolv_options="options rotate timeout:30\n"),
    ):
        for number in range(10):
            ask(net, PEER4, number)
    assert len(first.seen) == len(second.seen) == 5


def test_another_server_may_have_a_better_answer(net: Net, tmp_path: Path) -> None:
    with (
        name_server(net, PEER4, lambda message: [answer_to(message, 1, rcode=SERVFAIL)]) as first,
        relay_for(net, tmp_path, PEER4, PEER_SECOND),
    ):
        with name_server(net, PEER_SECOND, lambda message: [answer_to(message, 2)]):
            assert ask(net, PEER4) == answer_to(query(0x1234), 2)
        assert ask(net, PEER4) == answer_to(query(0x1234), 1, rcode=SERVFAIL), "the one answer there is"
    assert len(first.seen) == 2


def test_equal_queries_go_together_and_everybody_gets_the_answer(net: Net, tmp_path: Path) -> None:
    all_have_asked = threading.Event()

    def late(message: bytes) -> list[bytes]:
        all_have_asked.wait(relay_net.TIMEOUT)
        return [answer_to(message, 1)]

    with (
        name_server(net, PEER4, late) as server,
        relay_for(net, tmp_path, PEER4),
    ):
        clients = [net.datagram(net.host, socket.AF_INET) for _ in range(5)]
        for number, client in enumerate(clients):
            client.connect((PEER4, 53))
            client.send(query(number))
            client.send(query(number))  # as clients do that hear nothing for a while
        relay_net.until(lambda: drained(net, net.host, 15053))
        relay_net.until(lambda: server.seen)
        all_have_asked.set()
        for number, client in enumerate(clients):
            assert client.recv(4096) == answer_to(query(number), 1)
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(4096)
            client.close()
        assert len(server.seen) == 1


def test_answers_of_others_are_ignored(net: Net, tmp_path: Path) -> None:
    """With the right id and question, from another address, and from another port of the right address."""
    forgers = [net.datagram(net.peer, socket.AF_INET, address) for address in ((PEER_SECOND, 53), (PEER4, 5353))]

    def serve(message: bytes) -> list[bytes]:
        for forger in forgers * 3:
            forger.sendto(answer_to(message, 66), (HOST4, server.seen[-1][0]))
        time.sleep(0.3)
        return [answer_to(message, 1)]

    with name_server(net, PEER4, serve) as server, relay_for(net, tmp_path, PEER4):
        assert ask(net, PEER4) == answer_to(query(0x1234), 1)
    for forger in forgers:
        forger.close()


def test_guessing_ends_on_another_port_and_id(net: Net, tmp_path: Path) -> None:
    def serve(message: bytes) -> list[bytes]:
        if len(server.seen) == 1:
            identifier = int.from_bytes(message[:2], "big")
            guesses = [(identifier ^ guess).to_bytes(2, "big") for guess in range(1, MAX_GUESSES + 1)]
            return [answer_to(guess + message[2:], 66) for guess in guesses]
        return [answer_to(message, 1)]

    with (
        name_server(net, PEER4, serve) as server,
        relay_for(net, tmp_path, PEER4) as (_, relay),
    ):
        assert ask(net, PEER4, patience=SOON) == answer_to(query(0x1234), 1), "before the timeout of 30 s"
        relay.wait_for("DNS answers are being guessed")
    (port, identifier), (next_port, next_identifier) = server.seen
    assert (port, identifier) != (next_port, next_identifier)
    assert port != next_port


def test_what_comes_between_two_queries_ends_the_use_of_a_port(net: Net, tmp_path: Path) -> None:
    """Whoever has found a port out has nothing to gain by it. Once more where the port has grown old before."""

    def port_found_out() -> bool:
        assert ask(net, PEER4) == answer_to(query(0x1234), 1)
        port = server.seen[-1][0]
        server.sock.sendto(answer_to(query(0x4321), 66), (HOST4, port))
        relay_net.until(lambda: not sockets(port))
        return scrape(net, 9902)['dns_total{kind="mismatched"}'] >= 1

    def sockets(port: int) -> str:
        return net.on_host("ss", "-Hanu", f"sport = :{port}")

    with (
        name_server(net, PEER4, lambda message: [answer_to(message, 1)]) as server,
        relay_for(net, tmp_path, PEER4, options=("--metrics", "127.0.0.1:9902")),
    ):
        relay_net.until(port_found_out)
        assert ask(net, PEER4) == answer_to(query(0x1234), 1)


def test_an_answer_to_another_question_is_ignored(net: Net, tmp_path: Path) -> None:
    def serve(message: bytes) -> list[bytes]:
        return [answer_to(message.replace(b"example", b"examplf"), 66), answer_to(message, 1)]

    with name_server(net, PEER4, serve), relay_for(net, tmp_path, PEER4):
        assert ask(net, PEER4) == answer_to(query(0x1234), 1)

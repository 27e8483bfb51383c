"""Who may use the relay, what it dials for them, and how their connections are counted."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.relay.connections import tally
from tpctl.relay.connections.dialling import OwnDial, are_one
from tpctl.relay.connections.dials import Dial, SelfDialGuard
from tpctl.relay.connections.hops import Hops, Link
from tpctl.relay.connections.proxy_protocol import Header
from tpctl.relay.connections.route import MAX_HOPS, MAX_WORKERS_HOPS, Peer, Refusal, Route, Surroundings
from tpctl.relay.connections.tally import Tally
from tpctl.relay.connections.tls import ListenerTls
from tpctl.relay.loop.deadlines import Deadlines
from tpctl.relay.loop.loop import Loop
from tpctl.relay.loop.networks import NetworkSet
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.access import Access, is_metadata, reaches_loopback_from_afar, reaches_neighbours_from_afar
from tpctl.relay.settings.listen import read_listen
from tpctl.relay.settings.model import FixedAddress, ListenerSettings, Role, ServicePorts, Source, TrustedSources

V6 = socket.AF_INET6
SERVER = Destination("192.0.2.1", 443)
HERE = Destination("10.0.0.2", 8080)
CLIENT = Peer("198.51.100.9", 40000)


def network_of(address: IPv4Address | IPv6Address, prefix: int) -> str:
    return f"{address}/{prefix if address.version == 6 else min(prefix, 32)}"


networks = st.builds(network_of, st.ip_addresses(), st.integers(0, 128))


@given(st.lists(networks, max_size=6), st.ip_addresses())
def test_a_set_of_networks_has_what_its_networks_have(texts: list[str], address: IPv4Address | IPv6Address) -> None:
    plain = [ip_network(text, strict=False) for text in texts]
    own = NetworkSet(plain)
    assert (str(address) in own) is any(address in network for network in plain)
    for network in plain:
        assert str(network[0]) in own
        assert str(network[-1]) in own


@pytest.mark.parametrize("what", ["", "localhost", "10.0.0", "::g", None, 7])
def test_what_is_no_address_is_in_no_network(what: object) -> None:
    assert what not in NetworkSet.of("0.0.0.0/0", "::/0")


def test_denied_stays_denied() -> None:
    both = Access(NetworkSet.of("10.0.0.0/8"), NetworkSet.of("10.1.0.0/16"), default_allow=False)
    assert [both.admits(host) for host in ("10.0.0.1", "10.1.0.1", "11.0.0.1", "::1")] == [True, False, False, False]
    assert Access().admits("10.0.0.1")
    assert not Access(default_allow=False).admits("10.0.0.1")


@pytest.mark.parametrize(
    ("host", "metadata"),
    [
        ("169.254.169.254", True),
        ("169.254.170.2", True),
        ("fd00:ec2::254", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("169.254.169.253", False),
        ("64:ff9b::808:808", False),
        ("192.0.2.1", False),
        ("fe80::1", False),
    ],
)
def test_metadata_services(host: str, metadata: bool) -> None:
    assert is_metadata(Destination(host, 80, V6 if ":" in host else socket.AF_INET)) is metadata


@pytest.mark.parametrize(
    ("destination", "client", "refused"),
    [
        ("127.0.0.1", "198.51.100.9", True),
        ("127.9.9.9", "2001:db8::9", True),
        ("::1", "198.51.100.9", True),
        ("0.0.0.0", "198.51.100.9", True),
        ("127.0.0.1", "10.0.0.2", False),
        ("127.0.0.1", None, False),
        ("10.0.0.2", "198.51.100.9", False),
    ],
)
def test_loopback_is_for_this_host(destination: str, client: str | None, refused: bool) -> None:
    family = V6 if ":" in destination else socket.AF_INET
    assert reaches_loopback_from_afar(Destination(destination, 80, family), client, is_local) is refused


@pytest.mark.parametrize(
    ("destination", "sender", "refused"),
    [
        ("169.254.7.7", "198.51.100.9", True),
        ("fe80::7", "2001:db8::9", True),
        ("169.254.7.7", "10.0.0.2", False),
        ("169.254.7.7", None, False),
        ("198.51.100.7", "198.51.100.9", False),
    ],
)
def test_link_local_addresses_are_not_named_from_afar(destination: str, sender: str | None, refused: bool) -> None:
    family = V6 if ":" in destination else socket.AF_INET
    assert reaches_neighbours_from_afar(Destination(destination, 80, family), sender, is_local) is refused


@pytest.mark.parametrize(
    "claimed", [Peer("198.51.100.9", 1), Peer("10.0.0.2", 1), Peer("127.0.0.1", 1), Peer("::1", 1)]
)
def test_a_header_does_not_bring_its_sender_here(claimed: Peer) -> None:
    loopback, link = Destination("127.0.0.1", 22), Destination("169.254.7.7", 80)
    assert route().decide(claimed, loopback, sender=CLIENT) is Refusal.LOOPBACK
    assert route().decide(claimed, link, sender=CLIENT) is Refusal.LINK_LOCAL
    assert route().decide(CLIENT, link, sender=Peer("127.0.0.1", 2)) is Refusal.LINK_LOCAL
    assert route().decide(CLIENT, link) == (Dial(link),), "it is redirected: its own packets went there"
    virtual = route(vips=lambda _destination: [loopback])
    assert virtual.decide(claimed, SERVER, sender=CLIENT) is Refusal.LOOPBACK
    assert route().decide(claimed, SERVER, sender=CLIENT) == (Dial(SERVER),)
    assert route().decide(Peer("127.0.0.1", 1), loopback, sender=Peer("127.0.0.1", 2)) == (Dial(loopback),)


def is_local(destination: Destination) -> bool:
    return destination.host == "10.0.0.2" or ip_address(destination.host).is_loopback


def no_vips(_destination: Destination) -> Sequence[Destination] | None:
    return None


def route(
    own: Mapping[Link, OwnDial] = MappingProxyType({}),
    vips: Callable[[Destination], Sequence[Destination] | None] = no_vips,
    hops: Hops | None = None,
    surely: Callable[[Destination], bool] = is_local,
    **settings: object,
) -> Route:
    whole = ListenerSettings(**{"name": "x", "role": Role.OUTBOUND, "listen": read_listen("*:15001")} | settings)  # type: ignore[arg-type]
    guard = SelfDialGuard(frozenset(), is_local)
    guard.watch([whole.listen])
    return Route(whole, 0, Surroundings(guard, own, hops or Hops(), vips, is_local, surely), ListenerTls())


def test_what_is_dialled() -> None:
    assert route().decide(CLIENT, SERVER) == (Dial(SERVER),)
    inbound = route(role=Role.INBOUND, source=Source.PASSTHROUGH)
    assert inbound.decide(CLIENT, HERE) == (Dial(HERE, "127.0.0.6", Destination("127.0.0.1", 8080)),)
    transparent = route(role=Role.INBOUND, source=Source.CLIENT)
    assert transparent.decide(CLIENT, HERE) == (Dial(HERE, CLIENT.host, transparent=True),)
    # Nobody could bring the answer back, or the address would not tell the connection from the data plane's own.
    for other in (Peer("2001:db8::9", 1), Peer(None, 0), Peer(HERE.host, 9)):
        assert transparent.decide(other, HERE) == inbound.decide(CLIENT, HERE)
    assert transparent.decide(CLIENT, HERE, translated=True) == inbound.decide(CLIENT, HERE)
    scoped = Destination("2001:db8::2", 8080, V6)
    assert transparent.decide(Peer("fe80::9", 1), scoped) == (Dial(scoped),)


def test_a_fixed_address_is_dialled_from_the_passthrough_address_only_if_it_is_on_this_host() -> None:
    here = route(role=Role.INBOUND, source=Source.PASSTHROUGH, upstream=FixedAddress(HERE))
    assert [dial.source for dial in here.decide(CLIENT, SERVER) if isinstance(dial, Dial)] == ["127.0.0.6"]
    there = route(role=Role.INBOUND, source=Source.PASSTHROUGH, upstream=FixedAddress(SERVER))
    assert there.decide(CLIENT, HERE) == (Dial(SERVER),)


def test_services_of_a_dataplane() -> None:
    services = ServicePorts({8080: (None, 80), 9090: ("::1", 90)})
    inbound = route(role=Role.INBOUND, upstream=services)
    assert inbound.decide(CLIENT, HERE) == (Dial(HERE._replace(port=80)),)
    assert inbound.decide(CLIENT, HERE._replace(port=9090)) == (Dial(Destination("::1", 90, V6)),)
    assert inbound.decide(CLIENT, HERE._replace(port=7)) == (Dial(HERE._replace(port=7)),)


@pytest.mark.parametrize(
    ("peer", "destination", "settings", "refusal"),
    [
        (CLIENT, HERE._replace(port=15001), {}, Refusal.OWN_PORT),
        (CLIENT, HERE, {"role": Role.INBOUND, "access": Access(default_allow=False)}, Refusal.SOURCE),
        (CLIENT, SERVER, {"access": Access(deny=NetworkSet.of("192.0.2.0/24"))}, Refusal.DESTINATION),
        (CLIENT, Destination("169.254.169.254", 80), {}, Refusal.METADATA),
        (CLIENT, Destination("127.0.0.1", 22), {}, Refusal.LOOPBACK),
        (CLIENT, Destination("240.0.0.1", 81), {"vips": lambda _destination: ()}, Refusal.NO_UPSTREAM),
        (CLIENT, SERVER, {"vips": lambda _destination: [HERE._replace(port=15001)]}, Refusal.OWN_PORT),
        (CLIENT, SERVER, {"role": Role.INBOUND, "upstream": FixedAddress(HERE), "access": Access(default_allow=False)},
         Refusal.SOURCE),
    ],
)  # fmt: skip
def test_what_is_refused(peer: Peer, destination: Destination, settings: dict[str, object], refusal: Refusal) -> None:
    assert route(**settings).decide(peer, destination) is refusal  # type: ignore[arg-type]


def test_a_dial_that_comes_back_is_known_by_when_it_was_established() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dial = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        time.sleep(0.2)
        later = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    looping = route(own={Link("198.51.100.9", 40000, SERVER): OwnDial(dial, Dial(SERVER, hops=1))})
    with dial, accepted, later, other:
        assert looping.brought_back(CLIENT, SERVER, accepted) == (Dial(SERVER, hops=2), 2)
        assert looping.brought_back(CLIENT, HERE, accepted) == (None, 0)
        assert looping.brought_back(Peer(None, 0), SERVER, accepted) == (None, 0)
        assert looping.brought_back(CLIENT, SERVER, other) == (None, 0), "the kernel gave a client the dial's port"
        accepted.send(b"x")
        dial.recv(1)
        assert looping.brought_back(CLIENT, SERVER, accepted) == (None, 0), "somebody has answered"


def test_a_relay_that_is_interrupted_while_it_asks_knows_its_dial_all_the_same() -> None:
    class Interrupted(socket.socket):
        interruptions = 3

        def getsockopt(self, *arguments: int) -> Any:
            found = super().getsockopt(*arguments)
            if self.interruptions:
                self.interruptions -= 1
                time.sleep(0.1)
            return found

    with socket.create_server(("127.0.0.1", 0)) as listener, Interrupted() as dial:
        dial.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            assert are_one(dial, accepted)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.6", pytest.param("::1", marks=pytest.mark.needs("ipv6"))])
def test_a_dial_of_another_worker_that_comes_back_is_asked_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    family = V6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        server = Destination(host, listener.getsockname()[1], family)
        dial = socket.create_connection(listener.getsockname()[:2], source_address=(host, 0))
        accepted, _ = listener.accept()
        time.sleep(0.2)
        later = socket.create_connection(listener.getsockname()[:2])
        other, _ = listener.accept()
    peer = Peer(*dial.getsockname()[:2])
    hops = Hops()
    passing = route(hops=hops, surely=lambda destination: destination.host == host)
    with dial, accepted, later, other:
        assert passing.brought_back(peer, server, accepted) == (None, 0), "no worker has such a dial"
        hops.note(Link(peer.host or "", peer.port, server), 1)
        again = Dial(server, host if host == "127.0.0.6" else None, hops=2)
        assert passing.brought_back(peer, server, accepted) == (again, 2)
        assert passing.brought_back(peer, server, other) == (None, 2), "established at another time"
        assert route(hops=hops, surely=lambda _destination: False).brought_back(peer, server, accepted) == (None, 2)
        with monkeypatch.context() as patch:
            patch.setattr("os.geteuid", lambda: 4321)
            assert passing.brought_back(peer, server, accepted) == (None, 2), "the socket of another user"
        accepted.send(b"x")
        dial.recv(1)
        assert passing.brought_back(peer, server, accepted) == (None, 2), "somebody has answered"


def test_who_is_refused_before_a_word_is_said() -> None:
    assert route().refuses_to_hear(CLIENT, None) is None
    assert route().refuses_to_hear(CLIENT, Dial(SERVER, hops=MAX_HOPS)) is None
    assert route().refuses_to_hear(CLIENT, Dial(SERVER, hops=MAX_HOPS + 1)) is Refusal.COMES_BACK
    proxied = route(
        listen=read_listen("*:15006 proxy_protocol"), trusted_ips=TrustedSources(NetworkSet.of("10.0.0.0/8"))
    )
    assert proxied.refuses_to_hear(CLIENT, None) is Refusal.UNTRUSTED
    assert proxied.refuses_to_hear(Peer(None, 0), None) is Refusal.UNTRUSTED
    assert proxied.refuses_to_hear(Peer("10.0.0.1", 1), None) is None
    assert proxied.refuses_to_hear(CLIENT, Dial(SERVER, hops=1)) is None, "it is the relay itself"


def test_when_the_kernel_cannot_be_asked_nobody_is_local() -> None:
    unknown = route(surely=lambda _destination: False)
    assert unknown.decide(Peer("127.0.0.1", 9), Destination("127.0.0.1", 22)) is Refusal.LOOPBACK
    assert unknown.decide(CLIENT, SERVER) == (Dial(SERVER),)


def test_loops_through_other_workers_end() -> None:
    crossing = route()
    assert crossing.counting_hops(0, (Dial(SERVER),)) == (Dial(SERVER),)
    assert crossing.counting_hops(3, (Dial(SERVER),)) == [Dial(SERVER, hops=3)]
    assert crossing.counting_hops(MAX_WORKERS_HOPS + 1, (Dial(SERVER),)) is Refusal.COMES_BACK


def test_where_a_client_behind_a_proxy_wanted_to_go() -> None:
    front = Destination("203.0.113.80", 443)
    header = Header(2, source=SERVER, destination=front)
    assert route().meant(HERE, header) == HERE
    assert route().meant(HERE._replace(port=15001), header) == front
    assert route().meant(Destination("0.0.0.0", 0), header) == front
    assert route().meant(HERE._replace(port=15001), Header(2, local=True)) == HERE._replace(port=15001)


def test_what_would_be_refused_and_is_allowed() -> None:
    metadata = Destination("169.254.169.254", 80)
    assert route(allow_metadata_addresses=True).decide(CLIENT, metadata) == (Dial(metadata),)
    assert route(access=Access(deny=NetworkSet.of("198.51.100.9/32"))).decide(CLIENT, SERVER) == (Dial(SERVER),)
    loopback = Destination("127.0.0.1", 22)
    assert route(upstream=FixedAddress(loopback)).decide(CLIENT, SERVER) == (Dial(loopback),)


def test_the_upstreams_of_a_virtual_address_that_may_be_dialled() -> None:
    behind = [Destination("192.0.2.7", 80), Destination("192.0.2.8", 80)]
    virtual = route(vips=lambda _destination: behind, access=Access(deny=NetworkSet.of("192.0.2.7/32")))
    assert virtual.decide(CLIENT, SERVER) == (Dial(behind[1]),)


def test_every_worker_counts_for_itself_and_everybody_reads_the_sum() -> None:
    counts = Tally(3)
    for worker, number in enumerate((5, 7, 11)):
        counts.be(worker)
        counts.add(2, tally.ACCEPTED, number)
        counts.enter(2, "10.0.0.1")
    assert counts.total(2, tally.ACCEPTED) == 23
    assert counts.row(2)[tally.ACCEPTED] == 23
    assert sum(counts.row(1)) == 0
    assert counts.connections_of(2, "10.0.0.1") == 3
    counts.leave(2, "10.0.0.1")
    assert counts.connections_of(2, "10.0.0.1") == 2
    assert counts.connections_of(3, "10.0.0.1") == 0


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "b"])), max_size=60))
def test_connections_of_a_source_alone(steps: list[tuple[bool, str]]) -> None:
    counts, model = Tally(1), {"a": 0, "b": 0}
    for comes, source in steps:
        if comes:
            counts.enter(0, source)
            model[source] += 1
        elif model[source]:
            counts.leave(0, source)
            model[source] -= 1
        assert {name: counts.connections_of(0, name) for name in model} == model


def test_what_is_late_expires_in_order_and_the_rest_does_not() -> None:
    loop = Loop()
    expired: list[str] = []

    def expire(name: str) -> None:
        expired.append(name)
        if name == "third":
            loop.stop()

    deadlines = Deadlines[str](loop, 0.05, expire)
    forever = Deadlines[str](loop, 0, expire)
    for name in ("first", "done", "second"):
        deadlines.add(name)
        forever.add(name)
    deadlines.discard("done")
    deadlines.discard("never there")
    loop.later(0.03, lambda: deadlines.add("third"))
    loop.run()
    loop.release()
    assert expired == ["first", "second", "third"]


def test_ipv6_networks_are_not_confused_with_ipv4() -> None:
    assert "0.0.0.1" not in NetworkSet([IPv6Network("::/64")])

"""`tpctl check` on a host with rules, a data plane and neighbours: real connections, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from tests.netns.lab import run, tpctl
from tests.netns.probed import ENGINES, INSTALL, KINDS, at_rest, capture, checked, everything, net, on_its_own, tracked
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import PEER, RELAY_USER, Net, Server, until
from tpctl.rehearsal import cgroup
from tpctl.rehearsal.cgroup import own_place

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("on_its_own")]
__all__ = ["net", "on_its_own"]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_arrives_and_nothing_is_left(net: Net, engine: str, tmp_path: Path) -> None:
    transparent = ("--transparent",) if engine == "tproxy" else ()
    with relay_net.relay(net, tmp_path, *transparent), net.inside(net.host):
        done = tpctl(*INSTALL, *ENGINES[engine])
        assert "lost" not in done.stderr, done.stderr
        before, entries = at_rest(), tracked()
        with capture("eth0") as left:
            fates, document = checked()
        assert fates == {f"{kind} over IPv{family}": "arrived" for family in (4, 6) for kind in KINDS}
        ends = [one["detail"] for one in document["probes"] if one["protocol"] == "tcp"]
        assert all("end to end" in detail for detail in ends), ends
        assert document["notProbed"] == []
        assert left == []
        until(lambda: everything() == before)  # the relay closes its sockets when it gets to it
        assert tracked() <= entries
        tpctl("uninstall")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_way_to_nobody_is_told_from_a_way_that_is_closed(net: Net, engine: str) -> None:
    """No data plane runs: a stand-in shows that connections would get there, or would not."""
    with net.inside(net.host):
        done = tpctl(*INSTALL, *ENGINES[engine])
        assert "nothing listens on tcp port 15006" in done.stderr
        assert "is refused" not in done.stderr, "that is said already"
        fates, document = checked()
        assert set(fates.values()) == {"refused"}, [
            (one["name"], one["fate"], one["detail"]) for one in document["probes"]
        ]
        assert all("the way there is open" in one["detail"] for one in document["probes"])
        run(["iptables", "-w", "-A", "OUTPUT", "-p", "tcp", "--dport", "15001", "-j", "DROP"])
        run(["ip6tables", "-w", "-A", "INPUT", "!", "-i", "lo", "-p", "tcp", "-j", "REJECT"])
        done = tpctl("apply")
        assert "warning: outbound TCP over IPv4 is lost" in done.stderr
        fates, _ = checked()
        lost = {name for name, fate in fates.items() if fate == "lost"}
        assert lost == {"outbound TCP over IPv4", "inbound TCP over IPv6"}
        tpctl("uninstall")


def test_a_data_plane_that_has_just_ended_is_told_from_a_way_that_is_closed(net: Net, tmp_path: Path) -> None:
    """Its connections still hold its ports (TIME-WAIT), which the stand-in has all the same."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(net.inside(net.host))
        with relay_net.relay(net, tmp_path):
            tpctl(*INSTALL, "--no-probe")
            for address in PEER.values():
                stack.callback(Server(net.listen(net.peer, (address, 8080)), lambda client, _: client.close()).close)
                with net.connect(net.host, (address, 8080)) as client:
                    assert relay_net.read_all(client) == b""
        waiting = ["ss", "--no-header", "--tcp", "--numeric", "state", "time-wait", "sport = :15001"]
        until(lambda: run(waiting).stdout.count(":15001") == len(PEER))
        fates, document = checked()
        assert set(fates.values()) == {"refused"}, fates
        assert all("the way there is open" in one["detail"] for one in document["probes"])
        tpctl("uninstall")


def test_one_port_is_enough_for_every_kind(net: Net, tmp_path: Path) -> None:
    """Nobody listens on the only port that is redirected, so the probes end at a socket of their own."""
    with relay_net.relay(net, tmp_path), net.inside(net.host):
        tpctl("install", "--kuma-dp-user", RELAY_USER, "--include-inbound-ports", "8080", "--no-probe")
        fates, document = checked()
        assert fates == {f"{kind} over IPv{family}": "arrived" for family in (4, 6) for kind in KINDS if "TCP" in kind}
        assert all("end to end" in one["detail"] for one in document["probes"])
        assert document["notProbed"] == []
        tpctl("uninstall")


def test_every_kind_arrives_through_ebpf(net: Net, tmp_path: Path) -> None:
    with own_place() as place:
        flags = ("--engine", "ebpf", "--ebpf-cgroup-path", str(place.cgroup), "--ebpf-bpffs-path", str(place.pins))
        with net.inside(net.host):
            tpctl(*INSTALL, *flags)
            fates, document = checked()
            assert set(fates.values()) == {"refused"}, [
                (one["name"], one["fate"], one["detail"]) for one in document["probes"]
            ]
        with relay_net.relay(net, tmp_path), net.inside(net.host):
            before = at_rest()
            with capture("eth0") as left:
                fates, document = checked()
            assert fates == {f"{kind} over IPv{family}": "arrived" for family in (4, 6) for kind in KINDS}, document
            assert left == []
            until(lambda: everything() == before)
        with net.inside(net.host):
            cgroup.enter(place.cgroup.parent)  # out of reach of the programs
            try:
                fates, document = checked()
            finally:
                cgroup.enter(place.cgroup)
            assert {name.split()[0] for name in fates} == {"inbound"}, document
            assert len([line for line in document["notProbed"] if "this process is not in" in line]) == 6
            tpctl("uninstall")


def test_a_rule_that_is_missing_lets_connections_pass_by(net: Net, tmp_path: Path) -> None:
    with relay_net.relay(net, tmp_path), net.inside(net.host):
        tpctl(*INSTALL, *ENGINES["nftables"])
        run(["nft", "flush", "chain", "inet", "tpctl", "output_last"])
        run(["nft", "flush", "chain", "inet", "tpctl", "prerouting_last"])
        with capture("eth0") as left:
            fates, _ = checked()
        assert {fates[f"{kind} over IPv{family}"] for kind in KINDS[:3] for family in (4, 6)} == {"passed by"}
        assert left == []
        tpctl("uninstall")


def test_a_rule_that_hides_connections_from_conntrack_is_named(net: Net, tmp_path: Path) -> None:
    """They pass by the data plane until a rule exempts them from it."""
    with relay_net.relay(net, tmp_path), net.inside(net.host):
        tpctl(*INSTALL, *ENGINES["nftables"])
        run(["iptables-nft", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "-j", "CT", "--notrack"])
        fates, document = checked()
        assert fates["inbound TCP over IPv4"] == "passed by", document
        assert fates["inbound TCP over IPv6"] == "arrived", document
        (found,) = (one["finding"] for one in document["probes"] if one["name"] == "inbound TCP over IPv4")
        assert "iptables-nft raw" in found["where"]
        assert "from conntrack" in found["where"]
        assert found["remedy"].startswith("iptables-nft -t raw -I PREROUTING -p tcp --dport ")
        run(["iptables-nft", "-t", "raw", "-I", "PREROUTING", "-p", "tcp", "-j", "ACCEPT"])
        fates, document = checked()
        assert fates["inbound TCP over IPv4"] == "arrived", document
        tpctl("uninstall")


def test_a_listener_elsewhere_refuses(net: Net) -> None:
    """One that is bound to an address to which nothing is redirected is not stood in for."""
    with net.inside(net.host), socket.create_server(("127.0.0.9", 15006)):
        tpctl(*INSTALL, *ENGINES["nftables"])
        fates, document = checked()
        assert fates["inbound TCP over IPv4"] == "refused"
        (said,) = (one["detail"] for one in document["probes"] if one["name"] == "inbound TCP over IPv4")
        assert "bound to 127.0.0.9" in said
        tpctl("uninstall")


def test_a_listed_name_server_gets_no_probe(net: Net, tmp_path: Path) -> None:
    """Also where the redirection is gone, the query stays on this host."""
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {relay_net.PEER4}\nnameserver 2001:db8::53\n")
    flags = ("--kuma-dp-user", RELAY_USER, "--redirect-dns", "--redirect-dns-tcp", "--resolv-conf", str(resolv_conf))
    with relay_net.relay(net, tmp_path), net.inside(net.host):
        tpctl("install", *flags, *ENGINES["nftables"])
        with capture("eth0") as left:
            fates, document = checked()
        assert set(fates.values()) == {"arrived"}, document
        assert {f"DNS {protocol} over IPv{family}" for protocol in ("UDP", "TCP") for family in (4, 6)} <= set(fates)
        run(["nft", "flush", "ruleset"])
        with capture("eth0") as gone:
            fates, document = checked()
        assert set(fates.values()) == {"passed by"}, document
        assert left == gone == []
        tpctl("uninstall")


def test_a_resolver_on_this_host_is_not_taken_for_the_data_plane(net: Net, tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 127.0.0.53\n")
    flags = ("--kuma-dp-user", RELAY_USER, "--redirect-dns", "--redirect-dns-tcp", "--resolv-conf", str(resolv_conf))
    stop = threading.Event()

    def resolve(sock: socket.socket) -> None:
        sock.settimeout(0.05)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                query, peer = sock.recvfrom(512)
                sock.sendto(query[:2] + bytes((query[2] | 0x80, 4)) + query[4:], peer)

    with (
        relay_net.relay(net, tmp_path),
        net.inside(net.host),
        socket.create_server(("127.0.0.53", 53)),
        net.datagram(net.host, socket.AF_INET, ("127.0.0.53", 53)) as sock,
    ):
        resolver = threading.Thread(target=resolve, args=(sock,))
        resolver.start()
        try:
            tpctl("install", *flags, *ENGINES["nftables"])
            fates, document = checked()
            assert set(fates.values()) == {"arrived"}, document
            run(["nft", "flush", "ruleset"])
            # Conntrack, which tells, goes with the last rule that needs it; on a real host others keep it.
            run(["nft", "add table ip other; add chain ip other in { type filter hook output priority 0; }; "
                 "add rule ip other in ct state new counter"])  # fmt: skip
            fates, document = checked()
            assert set(fates.values()) == {"passed by"}, document
            tpctl("uninstall")
        finally:
            stop.set()
            resolver.join()


def test_required_arrival_takes_a_change_back(net: Net) -> None:
    with net.inside(net.host):
        tpctl(*INSTALL, *ENGINES["nftables"], "--require-arrival")
        before = run(["nft", "list", "table", "inet", "tpctl"]).stdout
        status = json.loads(tpctl("status", "--json", check=False).stdout)
        assert status["pending"] is None
        run(["iptables", "-w", "-A", "INPUT", "-p", "tcp", "--dport", "15006", "-j", "DROP"])
        flags = (*INSTALL, *ENGINES["nftables"], "--exclude-inbound-ports", "22")
        done = tpctl(*flags, "--require-arrival", check=False)
        assert done.returncode == 1
        assert "error: inbound TCP over IPv4 is lost" in done.stderr
        assert "was taken back" in done.stderr
        assert "dport 22" not in run(["nft", "list", "table", "inet", "tpctl"]).stdout
        assert "dport 22" not in before
        done = tpctl(*flags, "--confirm-within", "600s")
        assert "`tpctl rollback` takes the install back now" in done.stderr
        tpctl("rollback")
        done = tpctl(*flags, "--require-arrival", "--no-probe", check=False)
        assert done.returncode == 2
        tpctl("uninstall")


def test_what_is_not_redirected_is_not_probed(net: Net) -> None:
    with net.inside(net.host):
        document = json.loads(tpctl("check", "--json").stdout)
        assert (document["installed"], document["probes"], document["notProbed"]) == (False, [], [])
        tpctl("install", "--kuma-dp-user", RELAY_USER, *ENGINES["nftables"], "--redirect-inbound=false",
              "--exclude-outbound-ips", "198.18.0.0/15", "--vnet", "br0:10.77.0.0/24")  # fmt: skip
        fates, document = checked()
        assert set(fates) == {"outbound TCP over IPv6"}
        assert [line.split(":")[0] for line in document["notProbed"]] == ["outbound over IPv4", "virtual network br0"]
        tpctl("uninstall")


def test_clients_whose_answers_go_into_a_tunnel_are_not_spoken_for(net: Net) -> None:
    """What wg-quick sets up when all traffic goes into the tunnel."""
    with net.inside(net.host):
        tpctl("install", "--kuma-dp-user", RELAY_USER, *ENGINES["nftables"], "--no-probe")
        assert checked()[1]["notProbed"] == []
        for command in (
            "link add wg0 type veth peer name far", "link set wg0 up", "link set far up",
            "route add default dev wg0 table 51820", "rule add not fwmark 51820 lookup 51820 priority 90",
            "rule add lookup main suppress_prefixlength 0 priority 80",
        ):  # fmt: skip
            run(["ip", *command.split()])
        assert checked()[1]["notProbed"] == [
            "inbound over IPv4 from clients beyond this host's own links: answers to them leave by wg0 and not by eth0 "
            "(ip-rule(8))"
        ]
        tpctl("uninstall")


@pytest.mark.parametrize("closes", [True, False])
def test_a_data_plane_that_does_not_call_on_is_not_called_lost(net: Net, closes: bool) -> None:
    """Such as an Envoy that has no cluster for the destination."""

    def serve(client: socket.socket, _peer: object) -> None:
        if not closes:
            client.settimeout(relay_net.TIMEOUT)
            with contextlib.suppress(ConnectionError):
                while client.recv(512):
                    pass

    with net.inside(net.host):
        os.seteuid(relay_net.RELAY_UID)
        listening = [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, reuse_port=False)
                     for port in (15001, 15006)]  # fmt: skip
        os.seteuid(0)
        servers = [relay_net.Server(one, serve) for one in listening]
        try:
            tpctl("install", "--kuma-dp-user", RELAY_USER, *ENGINES["nftables"], "--require-arrival")
            before = at_rest()
            with capture("eth0") as left:
                fates, document = checked()
            assert set(fates.values()) == {"arrived"}
            said = {one["detail"] for one in document["probes"]}
            what = "closed it" if closes else "did not call the destination on"
            assert all("at the data plane, which took it on tcp port 1500" in one and what in one for one in said), said
            until(lambda: everything() == before)
            assert left == []
            tpctl("uninstall")
        finally:
            for server in servers:
                server.close()


def test_an_included_port_that_an_application_has(net: Net, tmp_path: Path) -> None:
    """The data plane calls the application, which gets a connection without data."""
    got: list[bytes] = []

    def serve(client: socket.socket, _peer: object) -> None:
        with contextlib.suppress(ConnectionError):
            got.append(client.recv(512))

    with relay_net.relay(net, tmp_path), net.inside(net.host):
        server = relay_net.Server(socket.create_server(("0.0.0.0", 8080)), serve)
        try:
            tpctl(*INSTALL, *ENGINES["nftables"], "--include-inbound-ports", "8080", "--ip-family-mode", "ipv4")
            fates, document = checked()
            assert set(fates.values()) == {"arrived"}, document
            assert len(fates) == len(KINDS)
            assert all(data == b"" for data in got)
            tpctl("uninstall")
        finally:
            server.close()


def test_a_firewall_that_lets_the_applications_ports_in(net: Net, tmp_path: Path) -> None:
    """TPROXY keeps the port, so that a port that nobody uses is rightly closed, and says nothing."""

    def serve(client: socket.socket, _peer: object) -> None:
        with contextlib.suppress(OSError):
            client.recv(512)

    with relay_net.relay(net, tmp_path, "--transparent"), net.inside(net.host):
        server = relay_net.Server(socket.create_server(("0.0.0.0", 8080)), serve)
        try:
            tpctl(*INSTALL, *ENGINES["tproxy"], "--ip-family-mode", "ipv4")
            run(["iptables", "-w", "-A", "INPUT", "!", "-i", "lo", "-p", "tcp", "!", "--dport", "8080", "-j", "DROP"])
            fates, document = checked()
            assert set(fates.values()) == {"arrived"}, document
            (said,) = (one["detail"] for one in document["probes"] if one["kind"] == "inbound")
            assert "to port 8080" in said
            run(["nft", "delete", "table", "inet", "tpctl"])
            fates, document = checked()
            assert fates["inbound TCP over IPv4"] == "passed by", document
            tpctl("uninstall")
        finally:
            server.close()

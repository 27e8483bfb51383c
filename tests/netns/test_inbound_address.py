"""What arrives is translated to another port of the address it goes to, and not to the address of an interface."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import lab
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST, HOST4, HOST6, PEER4, PEER6, Net

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
ROUTED = {socket.AF_INET: "192.0.2.5", socket.AF_INET6: "2001:db8:5::5"}
"""Addresses of this host that only lo has."""
PORT, LISTENER = 8080, 15006
ORIGINAL_DESTINATION = 80
"""SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST."""


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False, passthrough6=False) as network:
        for address in ROUTED.values():
            network.add_address(network.host, address, "lo")
        for family, via in ((socket.AF_INET, HOST4), (socket.AF_INET6, HOST6)):
            relay_net.run("ip", "-n", network.peer, "route", "add", ROUTED[family], "via", via)
        yield network


def tpctl(net: Net, *arguments: str) -> str:
    with net.inside(net.host):
        done = lab.tpctl(*arguments)
    return done.stdout + done.stderr


def install(net: Net, engine: str, *more: str) -> str:
    return tpctl(net, "install", "--kuma-dp-user", relay_net.RELAY_USER, *ENGINES[engine], *more)


def arrive(net: Net, listener: socket.socket, to: str) -> tuple[str, tuple[str, int]]:
    """Call the host from outside; the address at which the data plane has the connection, and where it was going."""
    listener.settimeout(relay_net.TIMEOUT)
    with net.connect(net.peer, (to, PORT)), listener.accept()[0] as accepted:
        at = accepted.getsockname()[0].removeprefix("::ffff:").partition("%")[0]
        return at, original_destination(accepted, ":" not in to)


def original_destination(accepted: socket.socket, is_ipv4: bool) -> tuple[str, int]:
    level, size, at = (socket.SOL_IP, 16, slice(4, 8)) if is_ipv4 else (socket.IPPROTO_IPV6, 28, slice(8, 24))
    raw = accepted.getsockopt(level, ORIGINAL_DESTINATION, size)
    return str(ipaddress.ip_address(raw[at])), struct.unpack("!H", raw[2:4])[0]


@contextlib.contextmanager
def dual_stack(net: Net) -> Iterator[socket.socket]:
    with net.inside(net.host):
        listener = socket.create_server(("::", LISTENER), family=socket.AF_INET6, dualstack_ipv6=True)
    with listener:
        yield listener


@pytest.mark.parametrize("engine", ENGINES)
def test_by_an_interface_without_an_address(net: Net, engine: str) -> None:
    """As hosts have it that speak BGP, or whose uplink is point to point."""
    for version in ("-4", "-6"):
        net.on_host("ip", version, "addr", "flush", "dev", "eth0", "scope", "global")
    net.on_host("ip", "route", "add", PEER4, "dev", "eth0", "src", ROUTED[socket.AF_INET])
    net.on_host("ip", "-6", "route", "add", PEER6, "dev", "eth0", "src", ROUTED[socket.AF_INET6])
    net.on_host("sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=0")
    for asking, asked, addresses in ((net.peer, net.host, (HOST4, HOST6)), (net.host, net.peer, (PEER4, PEER6))):
        link = json.loads(relay_net.run("ip", "-j", "-n", asked, "link", "show", "eth0"))[0]
        for address in addresses:
            neighbour = (address, "lladdr", link["address"], "dev", "eth0")
            relay_net.run("ip", "-n", asking, "neigh", "replace", *neighbour)
    install(net, engine)
    with dual_stack(net) as listener:
        for address in ROUTED.values():
            assert arrive(net, listener, address) == (address, (address, PORT))
    tpctl(net, "uninstall")


@pytest.mark.parametrize("engine", ENGINES)
def test_each_address_keeps_to_itself(net: Net, engine: str) -> None:
    """A listener of one address has what goes to that one, by whatever interface, also what the host itself sends."""
    install(net, engine)
    for family, other in ROUTED.items():
        with net.listen(net.host, (other, LISTENER)) as listener:
            assert arrive(net, listener, other) == (other, (other, PORT))
            with pytest.raises(ConnectionRefusedError):
                net.connect(net.peer, (HOST[family], PORT))
        with dual_stack(net) as listener:
            assert arrive(net, listener, HOST[family]) == (HOST[family], (HOST[family], PORT))
    tpctl(net, "uninstall")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_link_local_address(net: Net, engine: str) -> None:
    install(net, engine)
    shown = net.on_host("ip", "-6", "-br", "addr", "show", "dev", "eth0")
    address = next(word.partition("/")[0] for word in shown.split() if word.startswith("fe80:"))
    with dual_stack(net) as listener, net.inside(net.peer), socket.socket(socket.AF_INET6) as client:
        client.settimeout(relay_net.TIMEOUT)
        listener.settimeout(relay_net.TIMEOUT)
        client.connect((address, PORT, 0, socket.if_nametoindex("eth0")))
        with listener.accept()[0] as accepted:
            assert accepted.getsockname()[0].partition("%")[0] == address
            assert original_destination(accepted, False) == (address, PORT)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_data_planes_own_calls_of_this_host(net: Net, engine: str) -> None:
    """They cross the inbound listener at the address that was called, which is no longer 127.0.0.1 or ::1."""
    install(net, engine)
    relay_net.LIBC.setfsuid(relay_net.RELAY_UID)
    try:
        with dual_stack(net) as listener:
            listener.settimeout(relay_net.TIMEOUT)
            for called in (*ROUTED.values(), "127.0.0.2"):
                with net.connect(net.host, (called, PORT)), listener.accept()[0] as accepted:
                    assert accepted.getsockname()[0].removeprefix("::ffff:") == called
                    assert original_destination(accepted, ":" not in called) == (called, PORT)
    finally:
        relay_net.LIBC.setfsuid(0)


@pytest.mark.parametrize("engine", ["iptables nft", "iptables legacy"])
def test_where_there_is_no_dnat_it_is_redirected_and_said(net: Net, engine: str, tmp_path: Path) -> None:
    programs = [f"{name}:{refusing_dnat(tmp_path, engine, name)}" for name in PROGRAMS]
    said = install(net, engine, "--iptables-executables", ",".join(programs))
    assert "NAT cannot change a port alone" in said
    variant = engine.removeprefix("iptables ")
    for tool in ("iptables", "ip6tables"):
        rules = net.on_host(f"{tool}-{variant}-save", "-t", "nat")
        assert "-j REDIRECT --to-ports 15006" in rules
        assert "-j DNAT" not in rules
    assert "differ from the plan" not in tpctl_status(net)
    with dual_stack(net) as listener:
        assert arrive(net, listener, ROUTED[socket.AF_INET]) == (HOST4, (ROUTED[socket.AF_INET], PORT))
    tpctl(net, "uninstall")


PROGRAMS = ("iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore")


def refusing_dnat(folder: Path, engine: str, name: str) -> Path:
    """A program like the host's own, with a kernel without the module: what it cannot know is refused."""
    variant = engine.removeprefix("iptables ")
    main, _, verb = name.partition("-")
    real = f"/usr/sbin/{main}-{variant}" + (f"-{verb}" if verb else "")
    program = folder / name
    judge = 'case "$text" in *"-j DNAT"*|*"-j SNAT"*) echo "No chain/target/match by that name." >&2; exit 1;; esac'
    refuse = f"\ntext=$(cat)\n{judge}"
    feed = '\nprintf "%s\\n" "$text" | ' if verb == "restore" else "\nexec "
    program.write_text(f'#!/bin/sh{refuse if verb == "restore" else ""}{feed}{real} "$@"\n')
    program.chmod(0o755)
    return program


def tpctl_status(net: Net) -> str:
    with net.inside(net.host):
        return lab.tpctl("status", check=False).stdout


def test_connections_of_an_older_install_go_on_when_it_is_replaced(net: Net) -> None:
    """An older tpctl redirected: what runs is translated as before, and what comes has the new rules."""
    net.on_host("nft", "-f", "-", stdin=OLD)
    with dual_stack(net) as listener:
        listener.settimeout(relay_net.TIMEOUT)
        with net.connect(net.peer, (ROUTED[socket.AF_INET], PORT)) as client, listener.accept()[0] as accepted:
            assert accepted.getsockname()[0] == f"::ffff:{HOST4}"
            install(net, "nftables")
            client.sendall(b"still there")
            assert accepted.recv(100) == b"still there"
            assert arrive(net, listener, ROUTED[socket.AF_INET])[0] == ROUTED[socket.AF_INET]
            tpctl(net, "uninstall")
            accepted.sendall(b"and after all is gone")
            assert client.recv(100) == b"and after all is gone"
        with pytest.raises(OSError) as refused:
            net.connect(net.peer, (ROUTED[socket.AF_INET], PORT))
        assert refused.value.errno == errno.ECONNREFUSED


OLD = """table inet tpctl {
	chain prerouting_last {
		type nat hook prerouting priority -98; policy accept;
		tcp flags & (fin | syn | rst | ack) == syn fib daddr type local counter jump inbound comment "tpctl/i0"
	}
	chain inbound {
		meta l4proto tcp counter redirect to :15006 comment "tpctl/i7: everything else"
	}
}
"""

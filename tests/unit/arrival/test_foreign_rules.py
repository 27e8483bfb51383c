"""What rules of other software ask for, whose they look like, and how a packet fares among them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from tpctl.arrival import walk
from tpctl.arrival.owners import Owner, owner_of
from tpctl.arrival.packets import Matching, Packet, match
from tpctl.engines import foreign_iptables, foreign_nft
from tpctl.engines.foreign import Hook, Place, Table, Verdict
from tpctl.engines.iptables import saved
from tpctl.spec.policy import Family

INPUT = Packet(
    "a connection", Hook.INPUT, Family.IPV4, "tcp", in_interface="eth0", sources=(ip_address("10.0.0.9"),),
    destinations=(ip_address("10.0.0.5"),), source_is_local=False, destination_is_local=True, source_port=40000,
    destination_port=15006, original_port=8080, is_translated=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("-i lo -j ACCEPT", Matching.NEVER),
        ("-i eth+ -j ACCEPT", Matching.ALL),
        ("! -i lo -j ACCEPT", Matching.ALL),
        ("-s 10.0.0.0/8 -p tcp -m tcp --dport 15006 -j ACCEPT", Matching.ALL),
        ("-s 10.0.0.0/8 -p udp -m udp --dport 15006 -j ACCEPT", Matching.NEVER),
        ("-p tcp -m multiport --dports 22,15000:15010 -j ACCEPT", Matching.ALL),
        ("-p tcp -m multiport ! --dports 22,80 -j ACCEPT", Matching.ALL),
        ("-p tcp -m tcp --dport 8080 -j ACCEPT", Matching.NEVER),
        ("-p tcp -m conntrack --ctorigdstport 8080 -j ACCEPT", Matching.ALL),
        ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", Matching.NEVER),
        ("-m conntrack --ctstate NEW,DNAT -j ACCEPT", Matching.ALL),
        ("-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP", Matching.NEVER),
        ("-m addrtype --dst-type LOCAL -j RETURN", Matching.ALL),
        ("-m addrtype ! --src-type LOCAL -j DROP", Matching.ALL),
        ("-m set --match-set banned src -j DROP", Matching.PERHAPS),
        ("-i lo -m set --match-set banned src -j DROP", Matching.NEVER),
        ("-m mark --mark 0x8000/0x8000 -j DROP", Matching.NEVER),
        ("-m owner --uid-owner 0 -j ACCEPT", Matching.NEVER),
        ('-m comment --comment "-i lo" -j DROP', Matching.ALL),
        ("-p icmp -m icmp --icmp-type 8 -j ACCEPT", Matching.NEVER),
    ],
)
def test_what_a_rule_of_iptables_matches(text: str, wanted: Matching) -> None:
    assert match(foreign_iptables.rule(text).conditions, INPUT) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('iifname "lo" accept', Matching.NEVER),
        ('iifname { "eth0", "eth1" } drop', Matching.ALL),
        ('iifname != "lo" counter packets 0 bytes 0 drop', Matching.ALL),
        ("ip saddr 10.0.0.0/8 tcp dport { 22, 15000-15010 } accept", Matching.ALL),
        ("ip6 saddr fd00::/8 accept", Matching.NEVER),
        ("tcp dport != 22 drop", Matching.ALL),
        ("ct state established,related accept", Matching.NEVER),
        ("ct state { established, new } accept", Matching.ALL),
        ("ct status dnat accept", Matching.ALL),
        ("ct original proto-dst 8080 drop", Matching.ALL),
        ("meta l4proto { tcp, udp } th dport 15006 accept", Matching.ALL),
        ("meta mark & 0x8000 == 0x8000 drop", Matching.NEVER),
        ("fib saddr type != local drop", Matching.ALL),
        ("fib saddr . iif oif missing drop", Matching.PERHAPS),
        ("ip saddr @banned drop", Matching.ALL),
        ("ip saddr @unknown drop", Matching.PERHAPS),
        ("limit rate 10/second burst 5 packets accept", Matching.PERHAPS),
        ('log prefix "drop it: " level warn drop comment "iifname lo accept"', Matching.ALL),
        ("meta nfproto ipv6 drop", Matching.NEVER),
        ("meta skuid 1000 accept", Matching.NEVER),
        ("icmp type echo-request accept", Matching.NEVER),
    ],
)
def test_what_a_rule_of_nft_matches(text: str, wanted: Matching) -> None:
    (rule,) = foreign_nft.rules(text, {"banned": ("192.0.2.0/24", "10.0.0.9 timeout 1h expires 59m")})
    assert match(rule.conditions, INPUT) is wanted
    assert rule.verdict in (Verdict.ACCEPT, Verdict.DROP)


def test_each_key_of_a_verdict_map_is_a_rule() -> None:
    found = foreign_nft.rules("ct state vmap { invalid : drop, new : jump more, established : accept }")
    assert [(rule.verdict, rule.target) for rule in found if match(rule.conditions, INPUT)] == [(Verdict.JUMP, "more")]


LISTING = """table inet filter {
\tset banned {
\t\ttype ipv4_addr
\t\telements = { 192.0.2.1,
\t\t\t     10.0.0.9 }
\t}

\tchain early {
\t\ttype filter hook input priority filter - 1; policy accept;
\t\tiifname "lo" drop
\t\tjump checks
\t}

\tchain checks {
\t\ttcp dport 22 return
\t\t%s
\t}

\tchain input {
\t\ttype filter hook input priority filter; policy drop;
\t\ttcp dport { 22, 8080 } accept
\t}
}
"""


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("ip saddr 192.0.2.9 drop", ["inet filter input: policy drop"]),
        ("ip saddr @banned reject", ["inet filter early > checks: ip saddr @banned reject"]),
        ("accept", ["inet filter early > checks: accept", "inet filter input: policy drop"]),
    ],
)
def test_to_accept_ends_a_base_chain_and_to_drop_ends_everything(rule: str, wanted: list[str]) -> None:
    tables = list(foreign_nft.tables_of(LISTING % rule))
    assert [stop.place.text for stop in walk.stops(tables, INPUT)] == wanted


def test_of_many_packets_an_exception_leaves_some() -> None:
    """What is not known of them may be either; what only some are spared, the others meet."""
    text = LISTING.replace("tcp dport { 22, 8080 }", "ip saddr 10.0.0.0/8") % "counter"
    anyone = Packet("connections", Hook.INPUT, Family.IPV4, "tcp", in_interface="eth0", destination_port=15006)
    stops = walk.stops(list(foreign_nft.tables_of(text)), anyone)
    assert [(stop.verdict, stop.extent) for stop in stops] == [
        (Verdict.ACCEPT, Matching.SOME),
        (Verdict.DROP, Matching.SOME),
    ]


@pytest.mark.parametrize(
    ("table", "chains", "text", "owner"),
    [
        ("filter", ("INPUT", "ufw-before-input"), "-j DROP", Owner.UFW),
        ("filter", ("INPUT", "ufw6-user-input"), "-j DROP", Owner.UFW),
        ("filter", ("INPUT", "INPUT_ZONES", "IN_public"), "-j REJECT", Owner.FIREWALLD),
        ("filter", ("INPUT", "ts-input"), "-j DROP", Owner.TAILSCALE),
        ("raw", ("PREROUTING",), '-j DROP -m comment --comment "wg-quick(8) rule for wg0"', Owner.WG_QUICK),
        ("filter", ("FORWARD", "DOCKER-USER"), "-j DROP", Owner.DOCKER),
        ("filter", ("OUTPUT", "KUBE-FIREWALL"), "-j DROP", Owner.KUBELET),
        ("nat", ("PREROUTING", "KUBE-SERVICES"), "-j DNAT", Owner.KUBE_PROXY),
        ("filter", ("FORWARD", "NETAVARK_FORWARD"), "-j DROP", Owner.PODMAN),
        ("filter", ("INPUT", "f2b-sshd"), "-j REJECT", Owner.FAIL2BAN),
        ("filter", ("INPUT", "CROWDSEC_CHAIN"), "-j DROP", Owner.CROWDSEC),
        ("filter", ("INPUT",), "-m set --match-set crowdsec-blacklists-0 src -j DROP", Owner.CROWDSEC),
        ("filter", ("INPUT", "cali-INPUT", "cali-wl-to-host"), "-j DROP", Owner.CALICO),
        ("filter", ("INPUT", "LIBVIRT_INP"), "-j DROP", Owner.LIBVIRT),
        ("filter", ("INPUT", "mine"), "-j DROP", Owner.ADMINISTRATOR),
    ],
)
def test_whose_a_rule_of_iptables_looks_like(table: str, chains: tuple[str, ...], text: str, owner: Owner) -> None:
    called = "".join(f":{name} -\n" for name in chains[1:])
    content = f"*{table}\n:{chains[0]} ACCEPT\n{called}-A {chains[-1]} {text}\nCOMMIT\n"
    (found,) = foreign_iptables.tables_of("iptables-nft", saved.read(content))
    chain = found.chains[chains[-1]]
    assert owner_of(Place(found, chain, chain.rules[0], chains)) is owner


@pytest.mark.parametrize(
    ("family", "name", "chain", "owner"),
    [
        ("inet", "firewalld", "filter_INPUT", Owner.FIREWALLD),
        ("ip", "wg-quick-wg0", "preraw", Owner.WG_QUICK),
        ("ip", "docker-bridges", "filter-forward", Owner.DOCKER),
        ("inet", "f2b-table", "f2b-chain", Owner.FAIL2BAN),
        ("ip6", "crowdsec6", "crowdsec6-chain", Owner.CROWDSEC),
        ("inet", "netavark", "INPUT", Owner.PODMAN),
        ("ip", "kube-proxy", "filter-input", Owner.KUBE_PROXY),
        ("ip", "libvirt_network", "guest_input", Owner.LIBVIRT),
        ("inet", "filter", "input", Owner.ADMINISTRATOR),
        ("inet", "tpctl", "leaving", Owner.TPCTL),
        ("inet", "tpctl_not_ours", "input", Owner.ADMINISTRATOR),
    ],
)
def test_whose_a_table_of_nft_looks_like(family: str, name: str, chain: str, owner: Owner) -> None:
    hook = "type filter hook input priority 0; policy accept;"
    text = f"table {family} {name} {{\n\tchain {chain} {{\n\t\t{hook}\n\t\tdrop\n\t}}\n}}\n"
    (table,) = foreign_nft.tables_of(text)
    found: Table = table
    assert owner_of(Place(found, found.chains[chain], found.chains[chain].rules[0], (chain,))) is owner


@pytest.mark.parametrize(
    ("marking", "extent"),
    [
        ("-j MARK --set-xmark 0x0/0xf0000", Matching.ALL),
        ("-p tcp -m tcp --dport 8080 -j MARK --set-xmark 0x10000/0x10000", Matching.ALL),
        ("-j MARK --set-xmark 0x10000/0x10000", None),
        ("-j MARK --set-xmark 0x10000/0xffffffff", None),
        ("-m set --match-set known src -j MARK --set-xmark 0x10000/0x10000", Matching.PERHAPS),
        ("-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", Matching.PERHAPS),
    ],
)
def test_what_is_accepted_by_a_mark_that_a_rule_has_set(marking: str, extent: Matching | None) -> None:
    rules = (marking, "-m mark --mark 0x10000/0x10000 -j RETURN", "-j DROP")
    text = "\n".join(["*filter", ":INPUT ACCEPT [0:0]", *(f"-A INPUT {rule}" for rule in rules), "COMMIT", ""])
    drops = [
        stop
        for stop in walk.stops(list(foreign_iptables.tables_of("iptables-nft", saved.read(text))), INPUT)
        if stop.verdict is Verdict.DROP
    ]
    assert [stop.extent for stop in drops] == ([] if extent is None else [extent])


@pytest.mark.parametrize(
    ("marking", "extent"),
    [
        ("meta mark set 0x00000001", None),
        ("tcp dport 8080 meta mark set 0x00000001", Matching.ALL),
        ("meta mark set meta mark | 0x00000001", Matching.PERHAPS),
        ("ct mark set 0x00000001", Matching.PERHAPS),
    ],
)
def test_what_is_accepted_by_a_mark_of_nftables(marking: str, extent: Matching | None) -> None:
    hook = "type filter hook input priority 0; policy accept;"
    rules = f"{hook}\n\t\t{marking}\n\t\tmeta mark 0x00000001 accept\n\t\tdrop"
    tables = foreign_nft.tables_of(f"table inet site {{\n\tchain input {{\n\t\t{rules}\n\t}}\n}}\n")
    drops = [stop for stop in walk.stops(list(tables), INPUT) if stop.verdict is Verdict.DROP]
    assert [stop.extent for stop in drops] == ([] if extent is None else [extent])

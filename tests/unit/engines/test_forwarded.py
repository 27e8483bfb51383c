"""Which chains may end the way of a forwarded packet."""

from __future__ import annotations

from tpctl.engines import forwarded
from tpctl.engines.iptables import saved
from tpctl.engines.nftables import listing

NATIVE = """\
table inet fw {
\tmap verdicts {
\t\ttype ifname : verdict
\t\telements = { "docker0" : jump by_map }
\t}

\tchain unused {
\t\tdrop
\t}

\tchain forwards {
\t\ttype filter hook forward priority filter; policy accept;
\t\tcounter packets 0 bytes 0 accept comment "drop nothing"
\t\tiifname vmap { "br0" : goto strict, "br1" : accept }
\t\toifname vmap @verdicts
\t\tjump harmless
\t\tjump strict
\t}

\tchain harmless {
\t\tct state established,related accept
\t}

\tchain strict {
\t\tip daddr 10.0.0.0/8 log prefix "x" reject with icmp type admin-prohibited
\t}

\tchain by_map {
\t\ttcp dport 25 drop
\t}
}
"""
LEGACY = """\
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:DOCKER-USER - [0:0]
:OTHER - [0:0]
[0:0] -A FORWARD -m comment --comment "-j DROP" -j DOCKER-USER
[0:0] -A DOCKER-USER -o eth0 -j REJECT --reject-with icmp-port-unreachable
[0:0] -A DOCKER-USER -j RETURN
[0:0] -A OTHER -j DROP
COMMIT
"""


def test_chains_of_nf_tables_that_are_reached_and_drop() -> None:
    (table,) = listing.read(NATIVE)
    assert set(forwarded.strict_chains(table)) == {"strict", "by_map"}


def test_chains_of_iptables_that_are_reached_and_drop() -> None:
    table = saved.read(LEGACY)["filter"]
    assert list(forwarded.strict_chains_of_saved(table)) == ["DOCKER-USER"]
    strict = saved.read(LEGACY.replace(":FORWARD ACCEPT", ":FORWARD DROP"))["filter"]
    assert list(forwarded.strict_chains_of_saved(strict)) == ["FORWARD (policy DROP)", "DOCKER-USER"]

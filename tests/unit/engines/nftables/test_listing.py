"""Reading what nft lists as text."""

from __future__ import annotations

from tpctl.engines.nftables.drain import redirected_ports
from tpctl.engines.nftables.listing import ListedChain, read
from tpctl.engines.nftables.table import Table
from tpctl.engines.nftables.transaction import replacement

LISTING = """\
# Warning: table ip nat is managed by iptables-nft, do not touch!
table ip nat {
\tcomment "x\udcff"
\tset s {
\t\ttype ifname
\t\telements = { "x\udcff" }
\t}

\tchain CH\udcff {
\t}

\tchain FORWARD {
\t\tcomment "of a chain"
\t\ttype filter hook forward priority filter; policy drop;
\t\toifname "x\udcffy" counter packets 0 bytes 0 jump DOCKER-USER
\t}

\tchain late {
\t\ttype nat hook output priority srcnat + 1; policy accept;
\t\ttcp dport 1 counter packets 0 bytes 0 redirect to :15001 comment "tpctl/x"
\t}
}
table inet empty {
}
"""


def test_tables_chains_and_hooks() -> None:
    nat, empty = read(LISTING)
    assert (nat.family, nat.name, nat.others[0][:2]) == ("ip", "nat", ("set", "s"))
    assert nat.chains[0] == ListedChain("CH\udcff")
    assert (nat.chains[1].hook, nat.chains[1].policy) == ("forward", "drop")
    assert nat.chains[1].rules == ('oifname "x\udcffy" counter packets 0 bytes 0 jump DOCKER-USER',)
    assert (empty.family, empty.name, empty.chains) == ("inet", "empty", ())


def test_a_table_that_was_listed_as_text_is_made_anew() -> None:
    found = read(LISTING)[0].objects()
    assert redirected_ports(found) == (15001,)
    assert replacement(found, Table()).startswith("delete table inet tpctl\n")

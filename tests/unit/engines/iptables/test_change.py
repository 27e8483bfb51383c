"""From what a table holds to what it should hold."""

from __future__ import annotations

from tpctl.engines.iptables.change import change, holdings, restore_text
from tpctl.engines.iptables.parts import Jump, TableRules
from tpctl.engines.iptables.rule import Rule
from tpctl.engines.iptables.saved import SavedTable, read

CURRENT = read(
    """\
*nat
:OUTPUT ACCEPT [0:0]
:TPCTL_DNS - [0:0]
:TPCTL_OUTBOUND - [0:0]
-A OUTPUT -p udp -j TPCTL_DNS
-A OUTPUT -j FOREIGN
-A OUTPUT -p tcp -j TPCTL_OUTBOUND
-A TPCTL_DNS -j RETURN
-A TPCTL_OUTBOUND -j RETURN
COMMIT
"""
)["nat"]
WANTED = TableRules(
    "nat",
    (("TPCTL_OUTBOUND", (Rule("RETURN", comment="tpctl/o0"),)),),
    (Jump("OUTPUT", Rule("TPCTL_OUTBOUND", protocol="tcp"), 1),),
)


def test_a_replacement_is_one_transaction_that_spares_foreign_rules() -> None:
    assert restore_text((change(CURRENT, WANTED),)).splitlines() == [
        "*nat",
        ":TPCTL_OUTBOUND - [0:0]",
        "-D OUTPUT -p tcp -j TPCTL_OUTBOUND",
        "-D OUTPUT -p udp -j TPCTL_DNS",
        "-F TPCTL_DNS",
        "-X TPCTL_DNS",
        "# tpctl/o0",
        "-A TPCTL_OUTBOUND -m comment --comment tpctl/o0 -j RETURN",
        "-I OUTPUT 1 -p tcp -j TPCTL_OUTBOUND",
        "COMMIT",
    ]


def test_removal_is_a_change_to_nothing() -> None:
    text = restore_text((change(CURRENT, TableRules("nat")),))
    assert "-A" not in text
    assert "-I" not in text
    assert "FOREIGN" not in text
    assert text.count("-X TPCTL_") == 2


OTHERS = ":OUTPUT ACCEPT [0:0]\n-A OUTPUT -j FOREIGN\n"


def test_the_way_back_is_a_change_to_what_was_held() -> None:
    back = change(read(f"*nat\n{OTHERS}COMMIT\n")["nat"], holdings(CURRENT))
    lines = restore_text((back,)).splitlines()
    assert "-I OUTPUT 1 -p udp -j TPCTL_DNS" in lines
    assert "-I OUTPUT 3 -p tcp -j TPCTL_OUTBOUND" in lines
    assert "-A TPCTL_DNS -j RETURN" in lines


def test_the_way_back_goes_to_the_end_of_a_chain_that_others_have_shortened() -> None:
    lines = restore_text((change(SavedTable("nat"), holdings(CURRENT)),)).splitlines()
    assert lines[-3:] == ["-I OUTPUT 1 -p udp -j TPCTL_DNS", "-A OUTPUT -p tcp -j TPCTL_OUTBOUND", "COMMIT"]


def test_nothing_of_ours_and_nothing_wanted_is_no_change() -> None:
    foreign = read("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j FOREIGN\nCOMMIT\n")["nat"]
    assert change(foreign, TableRules("nat")).operations == ()


def test_comments_can_be_left_out_of_rules_but_not_of_the_text() -> None:
    text = restore_text((change(SavedTable("nat"), WANTED),), comments=False)
    assert "--comment" not in text
    assert "# tpctl/o0" in text


def test_under_the_lock_rules_go_by_number_and_policies_keep_their_counters() -> None:
    rules = "[1:2] -A OUTPUT -j FOREIGN\n[3:4] -A OUTPUT -j TPCTL_DNS\n"
    current = read(f"*nat\n:OUTPUT DROP [7:420]\n:TPCTL_DNS - [0:0]\n{rules}COMMIT\n")["nat"]
    text = restore_text((change(current, TableRules("nat")),), numbered=True, policies={"nat": current.policies})
    assert text.splitlines() == [
        "*nat",
        ":OUTPUT DROP [7:420]",
        "-D OUTPUT 2",
        "-F TPCTL_DNS",
        "-X TPCTL_DNS",
        "COMMIT",
    ]

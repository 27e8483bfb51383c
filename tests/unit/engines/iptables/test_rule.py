"""Rules as values and as text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.engines.iptables.rule import Criterion, Match, Option, Rule, match, parse, quote, split

words = st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=8)
values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"))
like_options = st.sampled_from(["-", "--", "!", "-j", "-m", "--comment", "--to-ports", "-A", "#", "\\", '"', "'"])
plain = st.text(alphabet="abcdef0123456789:/.,", min_size=1, max_size=12)
names = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=15)
options = st.builds(Option, words, st.lists(plain, max_size=3).map(tuple), st.booleans())
criteria = st.none() | st.builds(Criterion, plain, st.booleans())
interfaces = st.none() | st.builds(Criterion, names | like_options, st.booleans())
rules = st.builds(
    Rule,
    target=st.sampled_from(["RETURN", "REDIRECT", "TPCTL_X"]),
    protocol=st.none() | st.sampled_from(["tcp", "udp"]),
    source=criteria,
    destination=criteria,
    in_interface=interfaces,
    out_interface=interfaces,
    matches=st.lists(
        st.builds(Match, words.filter(lambda name: name != "comment"), st.lists(options, max_size=3).map(tuple)),
        max_size=3,
    ).map(tuple),
    target_options=st.lists(options, max_size=2).map(tuple),
    comment=st.none() | values | like_options,
    goto=st.booleans(),
)


@given(rules)
def test_what_is_rendered_parses_back(rule: Rule) -> None:
    assert parse(rule.render()) == rule


@given(values | like_options)
def test_quoted_text_is_one_word(text: str) -> None:
    assert [word for word, _ in split(quote(text))] == [text]


def test_a_line_break_cannot_end_the_line_of_a_rule() -> None:
    rule = Rule("RETURN", comment="a\nCOMMIT\n*nat", in_interface=Criterion("eth0"))
    assert parse(rule.render()) == replace(rule, comment="a COMMIT *nat")


@pytest.mark.parametrize("text", ["-", "--", "-j", "-m", "--comment", "--to-ports", "-j_TPCTL"])
def test_text_that_iptables_save_does_not_quote_is_no_option(text: str) -> None:
    """It quotes nothing that consists of letters, digits, dashes and underscores."""
    rule = parse(f"-p udp -m comment --comment {text} -m string --string {text} --algo bm -j LOG --log-prefix {text}")
    assert (rule.comment, rule.target) == (text, "LOG")
    assert rule.target_options == (Option("log-prefix", (text,)),)
    assert rule.matches == (match("string", ("string", text), ("algo", "bm")),)


@pytest.mark.parametrize("name", ["-j", 'a"b', '"', '"a', "\\", "it's", "\u3000", "-", "!"])
def test_the_name_of_an_interface_as_iptables_save_writes_it(name: str) -> None:
    rule = parse(f'-i {name} ! -o {name} -m comment --comment "a \\"b\\" c" -j RETURN')
    assert rule.in_interface == Criterion(name)
    assert rule.out_interface == Criterion(name, negated=True)
    assert (rule.comment, rule.target) == ('a "b" c', "RETURN")


def test_a_line_of_iptables_save() -> None:
    line = (
        '! -d 127.0.0.1/32 -o lo -p tcp -m owner ! --uid-owner 5678 -m comment --comment "it\\\'s -j \\"KUMA\\"" '
        "-j REDIRECT --to-ports 15001"
    )
    assert parse(line) == Rule(
        target="REDIRECT",
        protocol="tcp",
        destination=Criterion("127.0.0.1/32", negated=True),
        out_interface=Criterion("lo"),
        matches=(match("owner", Option("uid-owner", ("5678",), negated=True)),),
        target_options=(Option("to-ports", ("15001",)),),
        comment='it\'s -j "KUMA"',
    )


def test_the_canonical_form_ignores_what_tools_leave_out() -> None:
    ours = parse("-p tcp -m tcp --dport 22 -m owner --uid-owner 1 -m comment --comment x -j LOG --log-level 4")
    theirs = parse("-p tcp -m owner --uid-owner 1 -m tcp --dport 22 -j LOG")
    assert ours.canonical() == theirs.canonical()
    assert ours.canonical() != parse("-p tcp -m owner --uid-owner 2 -m tcp --dport 22 -j LOG").canonical()

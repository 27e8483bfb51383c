"""Rules as values and as text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.engines.iptables.rule import Criterion, Match, Option, Rule, match, parse, quote, split

words = st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=8)
values = st.text(
    alphabet=st.characters(codec="ascii", exclude_characters="\n\r\t\x0b\x0c\x1c\x1d\x1e\x1f\x00"), min_size=1
)
plain = st.text(alphabet="abcdef0123456789:/.,", min_size=1, max_size=12)
options = st.builds(Option, words, st.lists(plain, max_size=3).map(tuple), st.booleans())
criteria = st.none() | st.builds(Criterion, plain, st.booleans())
rules = st.builds(
    Rule,
    target=st.sampled_from(["RETURN", "REDIRECT", "TPCTL_X"]),
    protocol=st.none() | st.sampled_from(["tcp", "udp"]),
    source=criteria,
    destination=criteria,
    in_interface=criteria,
    out_interface=criteria,
    matches=st.lists(
        st.builds(Match, words.filter(lambda name: name != "comment"), st.lists(options, max_size=3).map(tuple)),
        max_size=3,
    ).map(tuple),
    target_options=st.lists(options, max_size=2).map(tuple),
    comment=st.none() | values,
    goto=st.booleans(),
)


@given(rules)
def test_what_is_rendered_parses_back(rule: Rule) -> None:
    assert parse(rule.render()) == rule


@given(values)
def test_quoted_text_is_one_word(text: str) -> None:
    assert [word for word, _ in split(quote(text))] == [text]


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

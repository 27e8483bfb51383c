"""The words of `tpctl status`; tests/netns has what it finds."""

from __future__ import annotations

import pytest

from tpctl.cli.commands.status import ago
from tpctl.cli.printing.output import UserNames, describe
from tpctl.host import users
from tpctl.spec.policy import Policy


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "just now"), (-30, "just now"), (1, "1 second ago"), (59.9, "59 seconds ago"), (60, "1 minute ago"),
        (7199, "1 hour ago"), (7200, "2 hours ago"), (86400, "1 day ago"), (40 * 86400, "40 days ago"),
    ],
)  # fmt: skip
def test_times_in_words(seconds: float, words: str) -> None:
    assert ago(seconds) == words


def test_users_have_names_where_they_have_some() -> None:
    names = UserNames(users.names_of([0, 4294967200, 0]))
    assert (names.of(0), names.of(4294967200)) == ("uid 0 (root)", "uid 4294967200")
    assert ("data plane user", "0 (root)") in describe(Policy(0), names)
    assert ("data plane user", "0") in describe(Policy(0))
    assert users.names_of([]) == {}

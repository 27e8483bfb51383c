"""`tpctl install` on a terminal, where nothing listens on the data plane's ports: it asks; in a script it warns."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.netns.lab import PROXY_USER, bare_namespace, tpctl
from tests.terminal import on_terminal
from tpctl.record import state

pytestmark = pytest.mark.root
INSTALL = ("install", "--kuma-dp-user", PROXY_USER, "--no-probe")
QUESTION = "Install all the same? [y/N]"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with bare_namespace() as space, space.inside():
        yield
        tpctl("uninstall")


def typed(answer: str, *more: str, exit_code: int) -> str:
    return on_terminal([sys.executable, "-m", "tpctl.cli.main", *INSTALL, *more], {}, typed=answer, exit_code=exit_code)


def test_no_changes_nothing() -> None:
    said = typed("n\n", exit_code=1)
    assert "nothing listens on tcp 15006 (inbound), tcp 15001 (outbound)" in said
    assert QUESTION in said
    assert "error: aborted; nothing was changed" in said
    assert state.load() is None


def test_yes_installs_and_is_not_asked_again() -> None:
    assert QUESTION in typed("y\n", exit_code=0)
    assert state.load() is not None
    assert QUESTION not in typed("", "--exclude-inbound-ports", "22", exit_code=0)


@pytest.mark.parametrize("more", ["--yes", "--json", "--dry-run"])
def test_who_is_not_asked(more: str) -> None:
    assert QUESTION not in typed("", more, exit_code=0)
    assert (state.load() is None) == (more == "--dry-run")


def test_a_script_is_warned() -> None:
    done = tpctl(*INSTALL)
    assert QUESTION not in done.stderr
    assert "warning: nothing listens on tcp port 15006" in done.stderr

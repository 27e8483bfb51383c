"""Commands that are run in the process of the tests."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.schemas import validated
from tpctl.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tpctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command; gives exit code, stdout and stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tpctl", *argv])
        with pytest.raises(SystemExit) as caught:
            main.main()
        out, err = capsys.readouterr()
        if "--json" in argv:
            validated(out)
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    thresholds = gc.get_threshold()
    yield run
    # A command tunes the garbage collector for a process that ends with it. Under Python 3.14, Hypothesis does not find
    # its own references any more once what was there is frozen.
    gc.unfreeze()
    gc.set_threshold(*thresholds)

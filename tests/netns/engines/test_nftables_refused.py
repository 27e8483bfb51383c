"""Rules that do not come, because nft or its child dies: nothing stays, or it is said; what did come is an install."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest

from tests.netns.lab import PROXY, bare_namespace, snapshot
from tpctl.engines.nftables import nft
from tpctl.engines.nftables.engine import NftablesEngine
from tpctl.engines.nftables.nft import Nft, NftError
from tpctl.engines.nftables.probe import EVERYTHING
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Policy
from tpctl.system.errors import ApplyError, HostError

pytestmark = pytest.mark.root

DIES = NftError("it ended with status -9")


class Dying:
    """A way to nf_tables whose calls end badly, before or after they have done what they were told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        try:
            self.way: Nft = nft.find()
        except HostError as error:
            pytest.skip(str(error))
        self.before: dict[int, Exception] = {}
        """By the number of the call that changes anything."""
        self.after: dict[int, Exception] = {}
        self._done = 0
        self._real = self.way.execute
        monkeypatch.setattr(self.way, "execute", self.execute)

    def execute(self, text: str) -> None:
        """In place of the real one, in the host's namespace; the comparison with the plan goes to another."""
        if "_scratch" in text or not self.is_counting():
            self._real(text)
            return
        self._done += 1
        if self._done in self.before:
            raise self.before[self._done]
        self._real(text)
        if self._done in self.after:
            raise self.after[self._done]

    def is_counting(self) -> bool:
        """Whether this is the thread of the test, not one in a scratch namespace."""
        return threading.current_thread() is threading.main_thread()

    def begins(self, *, before: dict[int, Exception], after: dict[int, Exception] | None = None) -> None:
        """The next call is the first."""
        self._done, self.before, self.after = 0, before, after or {}


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dying]:
    with bare_namespace() as space, space.inside():
        yield Dying(monkeypatch)


@pytest.mark.parametrize("stands", [None, Policy(PROXY)], ids=["bare", "installed"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({2: DIES}, {}),  # the rules
        ({2: DIES, 3: DIES}, {}),  # and the child that takes the sets away
        ({}, {1: DIES}),  # the sets, once they were made
        ({2: OSError(12, "Cannot allocate memory")}, {}),  # no child at all
        ({2: MemoryError()}, {}),
    ],
    ids=["rules", "rules and sets", "after the sets", "no child", "no memory"],
)
def test_sets_of_rules_that_did_not_come_go(
    dying: Dying, stands: Policy | None, before: dict[int, Exception], after: dict[int, Exception]
) -> None:
    engine = NftablesEngine(dying.way, EngineOptions())
    if stands:
        engine.apply(engine.plan(stands))
    was = snapshot(counters=False)
    dying.begins(before=before, after=after)
    with pytest.raises((ApplyError, OSError, MemoryError)) as raised:
        engine.apply(engine.plan(EVERYTHING))
    assert "may be left" not in str(raised.value)
    assert snapshot(counters=False) == was


@pytest.mark.parametrize("stands", [None, Policy(PROXY)], ids=["bare", "installed"])
@pytest.mark.parametrize("error", [DIES, ApplyError("it took too long"), OSError(12, "Cannot allocate memory")])
def test_sets_that_stay_are_said_and_the_next_command_removes_them(
    dying: Dying, stands: Policy | None, error: Exception
) -> None:
    engine = NftablesEngine(dying.way, EngineOptions())
    bare = snapshot(counters=False)
    if stands:
        engine.apply(engine.plan(stands))
    dying.begins(before={2: error, 3: error, 4: error})
    with pytest.raises(ApplyError, match="Sets that no rule uses may be left in table inet tpctl") as raised:
        engine.apply(engine.plan(EVERYTHING))
    assert "Nothing was changed" not in str(raised.value)
    assert "set this_host" in snapshot(counters=False)["nft"]
    dying.begins(before={})
    wanted = engine.plan(dataclasses.replace(Policy(PROXY), drop_invalid=True))
    engine.apply(wanted)
    assert engine.inspect(wanted).drift == ()
    engine.remove()
    assert snapshot(counters=False) == bare


@pytest.mark.parametrize("error", [DIES, ApplyError("it took too long")])
def test_rules_that_came_before_nft_died_are_installed(dying: Dying, error: Exception) -> None:
    engine = NftablesEngine(dying.way, EngineOptions())
    dying.begins(before={}, after={2: error})
    plan = engine.plan(EVERYTHING)
    engine.apply(plan)
    assert engine.inspect(plan).drift == ()

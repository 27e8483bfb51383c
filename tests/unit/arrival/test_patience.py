"""The clock by which probes are waited for."""

from __future__ import annotations

import time

from tpctl.arrival.patience import LOOK_SECONDS, Waited


def test_what_this_process_was_late_with_does_not_count() -> None:
    waited = Waited()
    before = waited.look()
    time.sleep(10 * LOOK_SECONDS)
    assert before < waited.look() <= before + LOOK_SECONDS


def test_it_goes_on() -> None:
    waited = Waited()
    while waited.look() < 3 * LOOK_SECONDS:
        time.sleep(LOOK_SECONDS / 4)

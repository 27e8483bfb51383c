"""The clock by which probes are waited for."""

from __future__ import annotations

import time

from tpctl.arrival.patience import LOOK_SECONDS, MOST_TIMES, Waited


def test_what_this_process_was_late_with_hardly_counts() -> None:
    began = time.monotonic()
    waited = Waited()
    before = waited.look()
    time.sleep(5 * LOOK_SECONDS)
    gained = waited.look() - before
    assert 0 < gained <= max(LOOK_SECONDS, (time.monotonic() - began) / MOST_TIMES)


def test_it_goes_on() -> None:
    waited = Waited()
    while waited.look() < 3 * LOOK_SECONDS:
        time.sleep(LOOK_SECONDS / 4)

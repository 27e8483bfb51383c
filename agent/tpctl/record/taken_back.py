"""What is remembered of a change that was taken back because nobody confirmed it: until the next install or uninstall.

Whoever was locked out comes back to a host that looks as if nothing had happened; `tpctl status` says what did.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tpctl.record import life, state


class TakenBack(NamedTuple):
    """A change that did not stay."""

    command: str
    at: str
    """ISO 8601, UTC."""
    now: str
    """What was installed after that, in words."""


def path() -> Path:
    """Its place for this network namespace: beside the folder of records, which goes with the last of them."""
    return state.DIRECTORY / f"{state.namespace_key()}{state.TRACE}"


def remember(command: str, now: str) -> None:
    """Leave a trace, if that can be done: a disk that is full must bar no way back. To be called under the lock."""
    document = {"command": command, "at": state.now(), "now": now, state.MARK: life.mark()}
    with contextlib.suppress(OSError):
        forget()
        state.DIRECTORY.mkdir(mode=0o755, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path(), flags, 0o644), "w", encoding="utf-8") as stream:
            json.dump(document, stream)


def load() -> TakenBack | None:
    """The trace, or None. A damaged one counts as none."""
    return state.read(path(), _of_document)


def _of_document(document: Mapping[str, Any]) -> TakenBack:
    return TakenBack(str(document["command"]), str(document["at"]), str(document["now"]))


def forget() -> None:
    """Remove the trace: somebody has decided what is to be installed. To be called under the lock."""
    with contextlib.suppress(OSError):
        path().unlink(missing_ok=True)

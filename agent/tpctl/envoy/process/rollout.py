"""Giving a running Envoy another configuration, step by step, and the old one back when it refuses a step.

Envoy takes the files of secrets, clusters and listeners independently of each other, and says nowhere but in its
figures what has become of each. So one file is written at a time, and the next one when Envoy has it. Clusters that are
no longer named stay until the connections that use them have had their time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tpctl.envoy.documents import BOOTSTRAP, CLUSTERS, LISTENERS, Documents, Resource
from tpctl.envoy.process.admin import Admin, AdminError, Figures
from tpctl.relay.loop.loop import Loop

LOOK_SECONDS = 0.03
PATIENCE_SECONDS = 30.0
"""For Envoy to take a step. It looks at a file at once; a busy machine may need seconds."""


class Step(NamedTuple):
    """A file that is written, and the version by which Envoy shows that it has it."""

    file: str
    content: bytes
    version: str


def with_clusters(documents: Documents, kept: Sequence[Resource]) -> Documents:
    """The documents with clusters that they do not name any more."""
    named = {cluster["name"] for cluster in documents.clusters}
    return documents._replace(clusters=[*documents.clusters, *(one for one in kept if one["name"] not in named)])


def steps(present: Documents, coming: Documents) -> list[Step]:
    """What leads from one configuration to another, whose bootstraps are not looked at.

    Each secret is a step of its own, in the order of the coming ones.
    """
    before, after = present.files(), coming.files()
    versions = coming.versions()
    changed = [name for name, content in after.items() if before.get(name) != content and name != BOOTSTRAP]
    return [Step(name, after[name], versions[name]) for name in changed]


def way_back(present: Documents, coming: Documents) -> list[Step]:
    """What leads back to the present configuration, wherever Envoy is between the two.

    Listeners may only name what is there: first everything comes back that listeners name, then these, as on the way.
    """
    back = steps(coming, present)
    secrets = [step for step in back if step.file not in (CLUSTERS, LISTENERS)]
    return [*reversed(secrets), *(step for step in back if step.file in (CLUSTERS, LISTENERS))]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rollout has ended."""

    refused: str | None = None
    """Which file Envoy has refused; None when it has taken everything."""
    reason: str = ""
    """Why, where that is no matter of Envoy's."""
    is_back: bool = True
    """Whether it has what it had before, after it has refused something."""
    steps: int = 0
    """How many there were."""


class Rollout:
    """Takes Envoy from one configuration to another. Calls `ended` once, unless it is given up."""

    def __init__(
        self,
        loop: Loop,
        admin: Admin,
        put: Callable[[str, bytes], None],
        way: tuple[Documents, Documents],
        ended: Callable[[Outcome], None],
    ) -> None:
        """`way` is from which documents to which. `put` writes a file by its name."""
        self._loop = loop
        self._admin = admin
        self._put = put
        self._present, self._coming = way
        self._ended = ended
        self._left = steps(*way)
        self._number = len(self._left)
        self._refused: str | None = None
        self._reason = ""
        self._given_up = False
        loop.later(0, self._next)

    def give_up(self) -> None:
        """Envoy has gone, or is to go."""
        self._given_up = True

    def _next(self) -> None:
        if self._given_up:
            return
        if not self._left:
            self._ended(Outcome(self._refused, self._reason, steps=self._number))
            return
        step = self._left.pop(0)
        try:
            before = self._admin.figures()
        except AdminError:
            before = None
        try:
            self._put(step.file, step.content)
        except OSError as error:
            self._turn_back(step.file, f"it cannot be written: {error.strerror}")
            return
        self._look(step, before, time.monotonic() + PATIENCE_SECONDS)

    def _look(self, step: Step, before: Figures | None, end: float) -> None:
        if self._given_up:
            return
        try:
            now = self._admin.figures()
        except AdminError:
            now = None
        if before is None:
            before = now
        if now is not None and before is not None:
            if now.refused.get(step.file, 0) > before.refused.get(step.file, 0):
                self._turn_back(step.file)
                return
            if _has(step, now):
                self._next()
                return
        if time.monotonic() >= end:
            self._turn_back(step.file, f"Envoy has not taken it within {PATIENCE_SECONDS:g} s")
            return
        self._loop.later(LOOK_SECONDS, lambda: self._look(step, before, end))

    def _turn_back(self, refused: str, reason: str = "") -> None:
        """Give Envoy what it had before: of some listeners or clusters of a refused file, it has the new ones."""
        if self._refused is not None:  # the way back
            self._ended(Outcome(self._refused, self._reason, is_back=False))
            return
        self._refused, self._reason = refused, reason
        self._left = way_back(self._present, self._coming)
        self._next()


def _has(step: Step, now: Figures) -> bool:
    """Whether Envoy has a step. A secret that no listener or cluster has asked for yet is in no figure."""
    default = "" if step.file in (CLUSTERS, LISTENERS) else step.version
    return now.versions.get(step.file, default) == step.version and not (step.file == LISTENERS and now.warming)

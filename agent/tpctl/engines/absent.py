"""In place of an engine of which the kernel holds nothing: what nobody has to load to find that out."""

from __future__ import annotations

from typing import NoReturn

from tpctl.engines.base import Applied, Footprint, Inspection, Plan, Removal
from tpctl.spec.policy import Family, Policy


class Absent:
    """To look with, and to remove. It plans nothing."""

    families = frozenset[Family]()
    variant: str | None = None
    reason = "the kernel holds nothing of it"

    def __init__(self, name: str) -> None:
        self.name = name

    def inspect(self, plan: Plan | None) -> Inspection:
        """Nothing is installed."""
        return Inspection(self.name, None, installed=False)

    def remove(self, *, dry_run: bool = False, footprint: Footprint | None = None, draining: bool = True) -> Removal:
        """Nothing goes."""
        return Removal()

    def plan(self, policy: Policy) -> NoReturn:
        """Never asked of it."""
        raise AssertionError(f"the engine {self.name} was only to look with")

    def preview(self, policy: Policy) -> NoReturn:
        """Never asked of it."""
        self.plan(policy)

    def unguarded(self, policy: Policy) -> NoReturn:
        """Never asked of it."""
        self.plan(policy)

    def footprint(self) -> NoReturn:
        """Never asked of it."""
        raise AssertionError(f"the engine {self.name} was only to look with")

    def apply(self, plan: Plan) -> Applied:
        """Never asked of it."""
        raise AssertionError(f"the engine {self.name} was only to look with")

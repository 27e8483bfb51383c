"""What a data plane may import later, imported while it is root: its user may not look into the folder of its code.

That is so where root has cloned it into /root, say. Elsewhere modules are imported when they are needed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Iterator

_PACKAGES = ("tpctl", "dns", "yaml")
"""dnspython imports the module of a record's type when it meets one."""
_ELSEWHERE = ("tpctl.cli", "tpctl.engines", "tpctl.bpf", "tpctl.rehearsal", "tpctl.arrival", "tpctl.change")
"""Rooms of other commands."""


def is_readable() -> bool:
    """Whether this process, with its effective user and groups, may read the code that it runs."""
    return all(os.access(place, os.R_OK | os.X_OK, effective_ids=True) for name in _PACKAGES for place in _places(name))


def load_all() -> None:
    """Import every module that either data plane may need. What cannot be imported is needed by nobody here."""
    for name in _PACKAGES:
        for module in _modules(name, _places(name)):
            # Of dnspython some need packages that are not there.
            with contextlib.suppress(ImportError):
                importlib.import_module(module)


def _places(package: str) -> list[str]:
    """The folders of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    return list((spec and spec.submodule_search_locations) or ())


def _modules(package: str, places: list[str]) -> Iterator[str]:
    """The names of its modules, and of theirs. None is imported unless the names of its own are asked for."""
    for found in pkgutil.iter_modules(places, f"{package}."):
        if found.name in _ELSEWHERE:
            continue
        yield found.name
        if found.ispkg:
            yield from _modules(found.name, _places(found.name))

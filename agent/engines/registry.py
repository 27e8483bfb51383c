"""Which engines there are, and which one to use."""

from __future__ import annotations

from typing import Any

from agent.engine_options import EngineOptions
from agent.engines.base import Engine
from agent.errors import InputError

ENGINES = ("iptables",)


def select(options: EngineOptions) -> Engine[Any]:
    """The engine `options` asks for, ready for this host.

    Raises InputError for an engine tpctl does not have, HostError when the host lacks what it needs.
    """
    if options.engine not in ("auto", *ENGINES):
        raise InputError(f"--engine {options.engine}: tpctl has the engines auto, {', '.join(ENGINES)}")
    from agent.engines.iptables.engine import select as select_iptables

    return select_iptables(options)

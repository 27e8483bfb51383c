"""Which engine to use."""

from __future__ import annotations

from agent.engine_options import EngineOptions
from agent.engines.iptables.engine import IptablesEngine
from agent.engines.iptables.engine import select as select_iptables
from agent.errors import InputError


def select(options: EngineOptions) -> IptablesEngine:
    """The engine `options` asks for, ready for this host.

    Raises InputError for an engine tpctl does not have, HostError when the host lacks what it needs.
    """
    if options.engine not in ("auto", IptablesEngine.name):
        raise InputError(f"--engine {options.engine}: tpctl has the engines auto and iptables")
    return select_iptables(options)

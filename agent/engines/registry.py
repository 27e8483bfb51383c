"""Which engines there are, and which one to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from agent.engine_options import EngineOptions
from agent.engines.base import Engine
from agent.errors import HostError, InputError


def _nftables(options: EngineOptions) -> Engine[Any]:
    from agent.engines.nftables.engine import load

    return load(options)


def _iptables(options: EngineOptions) -> Engine[Any]:
    from agent.engines.iptables.engine import select as select_variant

    return select_variant(options)


def _ebpf(options: EngineOptions) -> Engine[Any]:
    from agent.engines.ebpf.engine import load

    return load(options)


Maker = Callable[[EngineOptions], Engine[Any]]

ENGINES: dict[str, Maker] = {"nftables": _nftables, "iptables": _iptables, "ebpf": _ebpf}


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """The engine to install with, and why."""

    engine: Engine[Any]
    reason: str


def select(options: EngineOptions) -> Selection:
    """The engine `options` asks for, ready for this host.

    Raises InputError for an engine tpctl does not have or a contradiction, HostError when the host lacks what it needs.
    """
    if options.engine in ENGINES:
        engine = ENGINES[options.engine](options)
        return Selection(engine, f"--engine {options.engine} was given{_variant_reason(engine)}")
    if options.engine != "auto":
        raise InputError(f"--engine {options.engine}: tpctl has the engines auto, {', '.join(ENGINES)}")
    if options.iptables_because or options.iptables_mode != "auto" or options.executables:
        engine = _iptables(options)
        return Selection(engine, f"{options.iptables_because or 'iptables was asked for'}{_variant_reason(engine)}")
    try:
        engine = _nftables(options)
    except HostError as error:
        engine = _iptables(options)
        return Selection(engine, f"nftables does not work here ({error}){_variant_reason(engine)}")
    return Selection(engine, engine.reason)


def available(options: EngineOptions) -> Iterator[Engine[Any]]:
    """Every engine that can work on this host, to look for what may be installed."""
    for name, make in ENGINES.items():
        try:
            yield make(dataclasses.replace(options, engine=name))
        except HostError:
            continue


def _variant_reason(engine: Engine[Any]) -> str:
    return f"; {engine.reason}" if engine.variant else ""

"""Which engines there are, and which one to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agent.engine_options import EngineOptions
from agent.engines.base import Engine
from agent.errors import ApplyError, HostError, InputError


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

    Raises InputError for an engine tpctl does not have or a contradiction, HostError when the host lacks what it needs,
    or does not answer.
    """
    try:
        return _selected(options)
    except ApplyError as late:
        raise HostError(f"{late}. Nothing was changed") from late


def _selected(options: EngineOptions) -> Selection:
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
    """Every engine that can work on this host, to look for what may be installed.

    One that could not install anything now, but may have, is among them: to look and to remove takes less. Raises
    HostError when it cannot be told whether one is: it is not passed over.
    """
    for name, make in ENGINES.items():
        try:
            engine = _looked_for(name, make, dataclasses.replace(options, engine=name))
        except ApplyError as late:
            raise HostError(f"{late}. Nothing was changed") from late
        if engine:
            yield engine


def holding(recorded: EngineOptions | None) -> list[Engine[Any]]:
    """Every engine with which to look for what is installed, and to remove it.

    The one that is on record is among them, with the programs it was given. Raises HostError when there are none any
    more: its rules would be taken for gone, and stay.
    """
    engines = {engine.name: engine for engine in available(EngineOptions())}
    if recorded is None or recorded.engine not in ("nftables", "iptables"):  # of eBPF, the pins tell
        return list(engines.values())
    try:
        if recorded.engine == "iptables" and not _has_iptables(recorded.iptables_mode):
            engines["iptables"] = _iptables(recorded)
        elif recorded.engine not in engines:
            engines["nftables"] = _nftables(recorded)
    except (HostError, InputError) as gone:
        raise HostError(
            f"the {recorded.engine} engine has installed rules here, by the record, but what it takes to see and "
            f"remove them is gone ({gone}). Nothing was changed; install it again, or remove the record in /run/tpctl "
            "if those rules are gone, too"
        ) from gone
    return list(engines.values())


def _has_iptables(variant: str) -> bool:
    from agent.engines.iptables import tools
    from agent.policy import Family

    return variant not in tools.VARIANTS or tools.find(variant, Family.IPV4) is not None


def _looked_for(name: str, make: Maker, options: EngineOptions) -> Engine[Any] | None:
    try:
        return make(options)
    except HostError:
        return REMNANTS[name](options) if name in REMNANTS else None
    except ApplyError:  # it did not answer in time
        if name not in REMNANTS:
            raise
        return REMNANTS[name](options)


def _readable_nftables(options: EngineOptions) -> Engine[Any] | None:
    from agent.engines.nftables import nft
    from agent.engines.nftables.engine import NftablesEngine
    from agent.engines.nftables.table import TABLE

    try:
        way = nft.find()
        nft.held(way, TABLE)
    except (HostError, nft.NftError):
        return None
    return NftablesEngine(way, options)


def _pinned_ebpf(options: EngineOptions) -> Engine[Any] | None:
    from agent.engines.ebpf.engine import EbpfEngine
    from agent.engines.ebpf.place import BPFFS, Place, bpffs

    try:
        kept = bpffs()
    except HostError:
        kept = BPFFS  # nothing is mounted there, but an install may have been told of another place
    where = Place(Path("/"), kept)  # to find pins and remove them, the control groups do not matter
    try:
        pinned = where.folder.is_dir() or any(where.elsewhere())
    except OSError:
        return None
    return EbpfEngine(where, options, chooses_sockets=True) if pinned else None


REMNANTS: dict[str, Callable[[EngineOptions], Engine[Any] | None]] = {
    "nftables": _readable_nftables,
    "ebpf": _pinned_ebpf,
}
"""What is left of an engine on a host on which it does not work (any more); None when that is nothing."""


def _variant_reason(engine: Engine[Any]) -> str:
    return f"; {engine.reason}" if engine.variant else ""

"""Which engines there are, and which one to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpctl.engines import presence
from tpctl.engines.absent import Absent
from tpctl.engines.base import Engine
from tpctl.spec.engine_options import EngineOptions
from tpctl.system.errors import ApplyError, HostError, InputError

if TYPE_CHECKING:
    from tpctl.engines.ebpf.place import Place


def _nftables(options: EngineOptions) -> Engine[Any]:
    from tpctl.engines.nftables.engine import load

    return load(options)


def _iptables(options: EngineOptions) -> Engine[Any]:
    from tpctl.engines.iptables.engine import select as select_variant

    return select_variant(options)


def _ebpf(options: EngineOptions) -> Engine[Any]:
    from tpctl.engines.ebpf.engine import load

    return load(options)


Maker = Callable[[EngineOptions], Engine[Any]]

ENGINES: dict[str, Maker] = {"nftables": _nftables, "iptables": _iptables, "ebpf": _ebpf}


class Selection(NamedTuple):
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


def confined_ebpf(
    options: EngineOptions | None, *, top: Path, pins: Path, chooses_sockets: bool | None = None
) -> Engine[Any]:
    """The eBPF engine for the current network namespace, kept to one control group and one BPF file system.

    `chooses_sockets` tells whether to use sk_lookup; None finds out. Raises HostError.
    """
    from tpctl.engines.ebpf.engine import load

    return load(options, top=top, pins=pins, chooses_sockets=chooses_sockets)


def available(
    options: EngineOptions, *, planning: str | None = None, known: Engine[Any] | None = None
) -> Iterator[Engine[Any]]:
    """Every engine that may hold something on this host, to look for what is installed and to remove it.

    `planning` is the name of the one that has to plan as well, if it works here; of the others, one that cannot install
    anything now may be among them, and one of which the kernel certainly holds nothing is not loaded. `known` is one
    that the caller has already. Raises HostError when it cannot be told whether one is there: it is not passed over.
    """
    can_look = False
    for name, make in ENGINES.items():
        mine = dataclasses.replace(options, engine=name)
        engine = known if known is not None and known.name == name else None
        try:
            if engine is None and name == "nftables" and name != planning:
                engine = _readable_nftables(mine)
            elif engine is None and can_look and name != planning and not HOLDS[name]():
                engine = Absent(name)
            elif engine is None:
                engine = _looked_for(name, make, mine)
        except ApplyError as late:
            raise HostError(f"{late}. Nothing was changed") from late
        if engine:
            can_look = True
            yield engine


def holding(recorded: EngineOptions | None, known: Engine[Any] | None = None) -> list[Engine[Any]]:
    """Every engine with which to look for what is installed, and to remove it; `known` is one that is there already.

    The one that is on record is among them, with the programs it was given. Raises HostError when there are none any
    more: its rules would be taken for gone, and stay.
    """
    engines = {engine.name: engine for engine in available(EngineOptions(), known=known)}
    if recorded is None or recorded.engine not in ("nftables", "iptables"):  # of eBPF, the pins tell
        return list(engines.values())
    try:
        if recorded.engine == "iptables" and not _has_iptables(recorded.iptables_mode):
            engines["iptables"] = _iptables(recorded)
        elif recorded.engine not in engines:
            engines["nftables"] = _nftables(recorded)
    except (HostError, InputError) as gone:
        raise HostError(
            f"the {recorded.engine} engine has installed rules here, by the record, but the tools needed to see and "
            f"remove them are gone ({gone}). Nothing was changed; install it again, or remove the record in /run/tpctl "
            "if those rules are gone, too"
        ) from gone
    return list(engines.values())


def _has_iptables(variant: str) -> bool:
    from tpctl.engines.iptables import tools
    from tpctl.spec.policy import Family

    return variant not in tools.VARIANTS or tools.find(variant, Family.IPV4) is not None


def _looked_for(name: str, make: Maker, options: EngineOptions) -> Engine[Any] | None:
    try:
        return make(options)
    except InputError:
        # Programs on record that are gone, or no longer root's alone, are not run; the host's own see the same rules.
        return _looked_for(name, make, dataclasses.replace(options, executables={})) if options.executables else None
    except HostError:
        return REMNANTS[name](options) if name in REMNANTS else None
    except ApplyError:  # it did not answer in time
        if name not in REMNANTS:
            raise
        return REMNANTS[name](options)


def _readable_nftables(options: EngineOptions) -> Engine[Any] | None:
    from tpctl.engines.nftables import nft
    from tpctl.engines.nftables.engine import NftablesEngine
    from tpctl.engines.nftables.table import TABLE

    try:
        way = nft.find()
        nft.held(way, TABLE)
    except (HostError, nft.NftError):
        return None
    return NftablesEngine(way, options)


def _pins() -> Place:
    """Where pins are; to find them and remove them, the control groups do not matter."""
    from tpctl.engines.ebpf.place import BPFFS, Place, bpffs

    try:
        kept = bpffs()
    except HostError:
        kept = BPFFS  # nothing is mounted there, but an install may have been told of another place
    return Place(Path("/"), kept)


def _pinned_ebpf(options: EngineOptions) -> Engine[Any] | None:
    from tpctl.engines.ebpf.engine import EbpfEngine

    where = _pins()
    try:
        pinned = where.home.is_dir() or any(where.elsewhere())
    except OSError:
        return None
    return EbpfEngine(where, options, chooses_sockets=True) if pinned else None


def _may_hold_programs() -> bool:
    """Whether there may be pins of this network namespace, or of dead ones, or their folder, or the table beside."""
    where = _pins()
    try:
        pinned = where.home.is_dir() or any(where.elsewhere())
    except OSError:
        return True
    return pinned or not presence.lacks(presence.BESIDE_PROGRAMS)


HOLDS: dict[str, Callable[[], bool]] = {"iptables": presence.may_hold_rules, "ebpf": _may_hold_programs}
"""Whether the kernel may hold anything of an engine."""


REMNANTS: dict[str, Callable[[EngineOptions], Engine[Any] | None]] = {
    "nftables": _readable_nftables,
    "ebpf": _pinned_ebpf,
}
"""What is left of an engine on a host on which it does not work (any more); None when that is nothing."""


def _variant_reason(engine: Engine[Any]) -> str:
    return f"; {engine.reason}" if engine.variant else ""

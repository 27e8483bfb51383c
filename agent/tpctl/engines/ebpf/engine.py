"""The eBPF engine: destinations are changed in connect(), and listeners chosen when a connection arrives; no NAT."""

from __future__ import annotations

import difflib
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from tpctl.bpf import bpffs, btf, syscall
from tpctl.bpf.build import Build, build
from tpctl.bpf.programs import POLICY_MAPS, PROGRAMS, Program
from tpctl.engines.base import Applied, Footprint, Inspection, Removal, RuleCounter
from tpctl.engines.ebpf import companion, listeners, place
from tpctl.engines.ebpf.companion import Companion
from tpctl.engines.ebpf.contents import Settings, describe
from tpctl.engines.ebpf.counters import read_counters
from tpctl.engines.ebpf.figures import figures
from tpctl.engines.ebpf.installed import Installed, Switch, clear_dead, is_dead, opened, targets, unpin
from tpctl.engines.ebpf.maps import fill, maps_for
from tpctl.engines.ebpf.place import Place
from tpctl.engines.ebpf.plan import EbpfPlan, listing, plan_for
from tpctl.host import routes
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family, Policy
from tpctl.system.errors import ApplyError, HostError

_MINIMUM = (5, 8)
_SETTLE_SECONDS = 0.02
_VERIFIER_LINES = 15
_REDIRECTING = ("sk_lookup", "connect4", "connect6", "sendmsg4", "sendmsg6")
_INSTEAD = "use --engine nftables or --engine iptables"


class EbpfEngine:
    """Carries plans out by eBPF programs on a cgroup and on the network namespace."""

    name = "ebpf"
    families = frozenset(Family)
    variant: str | None = None

    def __init__(self, where: Place, options: EngineOptions, *, chooses_sockets: bool) -> None:
        self.where = where
        self.options = options
        self.chooses_sockets = chooses_sockets
        self.reason = "this kernel has cgroup2, BTF and every type of eBPF program needed"
        if not chooses_sockets:
            self.reason = (
                "this kernel has cgroup2 and BTF, but no sk_lookup programs: nftables redirects inbound connections"
            )

    def plan(self, policy: Policy) -> EbpfPlan:
        """The maps for a policy. Raises InputError for what cannot be done."""
        local = [network for family in sorted(policy.families) for network in routes.local_prefixes(family)]
        return plan_for(policy, local, chooses_sockets=self.chooses_sockets, comments=self.options.comments)

    def unguarded(self, policy: Policy) -> str | None:
        """Why nf_tables cannot do its part of the guard; None when it can, or has none."""
        return companion.unguarded(policy, chooses_sockets=self.chooses_sockets)

    def preview(self, policy: Policy) -> str:
        """What `apply` would put into the kernel. Changes nothing."""
        return self.plan(policy).render()

    def footprint(self) -> Footprint:
        """Nothing: the programs are ours alone, and nothing else changes."""
        return {}

    def apply(self, plan: EbpfPlan) -> Applied:
        """Load the programs with maps of their own, fill these, and put them in place of any that run."""
        bpffs.mount(self.where.bpffs)
        here = place.netns()
        built = build(btf.of_kernel(cookie=here.is_cookie))
        clear_dead(self.where)
        folder = self.where.make_folder()
        try:
            with opened(folder) as before, maps_for(built, plan.contents, before) as maps:
                fill(maps, plan.contents, here.number)
                with companion.put(plan.companion):
                    self._switch(built, plan, before, maps)
                    if not before.links:
                        self._prove(folder, maps["anchor"])
                moved = tuple(_unpinned(other) for other in self.where.elsewhere())
                replaced = ("tpctl's programs (eBPF)",) if before.links or moved else ()
                return Applied(replaced, tuple(_notices(plan.companion)))
        except OSError as error:
            raise ApplyError(f"the eBPF programs cannot be put in place: {error}") from error
        finally:
            _remove_if_empty(folder)  # when nothing was installed

    def _switch(self, built: Build, plan: EbpfPlan, before: Installed, maps: Mapping[str, int]) -> None:
        with ExitStack() as stack:
            loaded: dict[str, int] = {}
            for program in plan.programs:
                loaded[program.name] = _load(program, built.with_maps(program.name, maps))
                stack.callback(os.close, loaded[program.name])
            port = plan.contents.settings.inbound_port
            listeners.register(maps["listeners"], port)
            Switch(self.where, plan.cgroup, place.netns().inode).run(loaded, before)
            # Again, for those that began to listen before the new sockops program could see it.
            listeners.register(maps["listeners"], port)

    def _prove(self, folder: Path, anchor: int) -> None:
        """Raise ApplyError, with everything detached again, when the kernel does not run what it let us attach.

        Before Linux 5.15 a socket has one cgroup, and once a host has used net_cls or net_prio it is theirs.
        """
        if place.is_inside(self.where.top) and syscall.lookup(anchor, bytes(4), 8) == bytes(8):
            unpin(folder, tuple(program.name for program in PROGRAMS))
            raise ApplyError(
                "the eBPF programs were attached, but the kernel does not run them: on this host sockets belong to "
                f"another hierarchy of cgroups (net_cls or net_prio). They were removed again; {_INSTEAD}"
            )

    def inspect(self, plan: EbpfPlan | None) -> Inspection:
        """What runs now, compared with `plan`. Raises HostError when it cannot be read."""
        try:
            beside = companion.inspect(plan.companion if plan else None)
            with opened(self.where.folder) as found:
                if not found.links and not (beside and beside.installed):
                    return Inspection(self.name, None, installed=False)
                drift = (*self._drift(plan, found), *(beside.drift if beside else ())) if plan else ()
                counters = _counters(found)
                return Inspection(
                    self.name,
                    None,
                    installed=True,
                    families=_families(found),
                    drift=drift,
                    counters=(*counters, *(beside.counters if beside else ())),
                    figures=tuple(figures(found, counters)),
                    version=next((one.version for one in _settings(found)), None),
                    registered=_registered(found),
                )
        except OSError as error:
            raise HostError(f"the eBPF programs cannot be read: {error}") from error

    def _drift(self, plan: EbpfPlan, found: Installed) -> Iterator[str]:
        here = place.netns()
        try:
            expected = targets(self.where, plan.cgroup, here.inode)
        except FileNotFoundError:
            yield f"-the cgroup {plan.cgroup}, which is gone"
            return
        for program in plan.programs:
            attached = found.links.get(program.name)
            if attached is None:
                yield f"-program {program.name} on {program.scope.value}"
            elif attached.info.target != expected[program.scope]:
                yield f"-program {program.name} on {program.scope.value}"
                yield f"+program {program.name} on another one, or one that is gone"
        if len(set(found.settings.values())) > 1:
            yield "+programs of two installations: a replacement was interrupted"
        actual = sorted(
            f"map {name}: {describe(name, key, value)}" for name in POLICY_MAPS for key, value in _read(found, name)
        )
        wanted = listing(plan.contents, here.number)
        yield from difflib.unified_diff(wanted, actual, "plan", "kernel", n=0, lineterm="")

    def remove(self, *, dry_run: bool = False, footprint: Footprint | None = None, draining: bool = True) -> Removal:
        """Detach our programs in this network namespace, and what dead ones left.

        Connections that run are not touched: nothing of them was ever translated. `draining` only gives the data plane
        the moment it needs to ask where the last accepted ones were going.
        """
        folder = self.where.folder
        names = tuple(program.name for program in PROGRAMS if (folder / program.name).exists())
        removed = tuple(f"eBPF: program {name}" for name in names)
        if dry_run:
            dead = tuple(item.name for item in self.where.folders() if is_dead(item))
            beside, _ = companion.remove(dry_run=True, draining=draining)
            return Removal(removed + beside + _of_dead(dead))
        try:
            beside, notices = companion.remove(dry_run=False, draining=draining)
            with suppress(OSError):  # tried again below
                unpin(folder, tuple(name for name in names if name in _REDIRECTING))
            if names and draining:
                time.sleep(_SETTLE_SECONDS)
            unpin(folder, tuple(program.name for program in PROGRAMS))
            removed += beside + _of_dead(clear_dead(self.where))
            _remove_if_empty(folder)
            removed += tuple(f"eBPF: programs under {_unpinned(other)}" for other in self.where.elsewhere())
        except OSError as error:
            state = "those that could be were" if _redirects(folder) else "but no traffic is redirected any more"
            raise ApplyError(f"eBPF programs under {folder} cannot be removed: {error.strerror}; {state}") from error
        return Removal(removed, notices)


def _notices(beside: Companion | None) -> Iterator[str]:
    if beside:
        purposes = ", ".join(beside.purposes)
        yield f"nftables does this alongside the eBPF programs, in the table {companion.TABLE}: {purposes}"


def _remove_if_empty(folder: Path) -> None:
    """And the one that other network namespaces' folders of pins are in, too."""
    for directory in (folder, folder.parent):
        with suppress(OSError):
            directory.rmdir()


def _unpinned(folder: Path) -> Path:
    """The folder, with everything in it detached and removed."""
    unpin(folder, tuple(program.name for program in PROGRAMS))
    folder.rmdir()
    _remove_if_empty(folder)
    return folder


def _redirects(folder: Path) -> bool:
    """Whether a program that redirects is still attached; a pin may hold one that is not."""
    try:
        with opened(folder) as found:
            return any(found.links[name].info.target for name in _REDIRECTING if name in found.links)
    except OSError:
        return True


def _of_dead(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"eBPF: programs of {name}, a network namespace that is gone" for name in names)


def _load(program: Program, code: bytes) -> int:
    try:
        return syscall.load_program(program.kind, program.attach_type, program.name, code)
    except syscall.RefusedError as refused:
        said = "\n".join(refused.log.splitlines()[-_VERIFIER_LINES:])
        raise ApplyError(
            f"the kernel refused the eBPF program {program.name}: {refused.error.strerror}. Nothing was changed; "
            f"{_INSTEAD}. The verifier's last lines, for a report of this:\n{said}"
        ) from refused


def _read(found: Installed, name: str) -> Iterator[tuple[bytes, bytes]]:
    descriptor = found.maps.get(name)
    if descriptor is None:
        return
    shape = syscall.map_info(descriptor).shape
    for key in syscall.keys(descriptor, shape.key_size):
        value = syscall.lookup(descriptor, key, shape.value_size)
        if value is not None:
            yield key, value


def _settings(found: Installed) -> Iterator[Settings]:
    return (Settings.unpack(value)[0] for _, value in _read(found, "settings"))


def _families(found: Installed) -> tuple[int, ...]:
    flags = next((one.flags for one in _settings(found)), frozenset())
    return tuple(number for number in (4, 6) if f"ipv{number}" in flags)


def _counters(found: Installed) -> tuple[RuleCounter, ...]:
    descriptor = found.maps.get("counters")
    return () if descriptor is None else tuple(read_counters(descriptor))


def _registered(found: Installed) -> frozenset[int] | None:
    descriptor = found.maps.get("listeners")
    return None if descriptor is None else listeners.registered(descriptor)


def _kernel() -> tuple[int, ...]:
    parts = os.uname().release.replace("-", ".").split(".")
    return tuple(int(part) for part in parts[:2] if part.isdecimal())


def load(
    options: EngineOptions | None = None,
    *,
    top: Path | None = None,
    pins: Path | None = None,
    chooses_sockets: bool | None = None,
) -> EbpfEngine:
    """The engine for this host, or for what runs in the control group of a directory, `top`.

    `pins` is a BPF file system; `chooses_sockets` is whether to use sk_lookup, when not by the kernel's version.
    Raises HostError, naming what was found and what is needed, when the host cannot do it; nothing was touched.
    """
    if not syscall.SUPPORTED or struct.pack("=H", 1) != b"\1\0":
        raise HostError(f"the eBPF engine does not know this machine ({os.uname().machine}); {_INSTEAD}")
    if _kernel() < _MINIMUM:
        needed = ".".join(map(str, _MINIMUM))
        raise HostError(f"this is Linux {os.uname().release}, and the eBPF engine needs {needed} or later; {_INSTEAD}")
    options = options or EngineOptions()
    where = place.find(top or _path(options.ebpf_cgroup), pins or _path(options.ebpf_bpffs))
    btf.of_kernel(cookie=place.netns().is_cookie)
    if chooses_sockets is None:
        chooses_sockets = all(_kernel() >= program.since for program in PROGRAMS)
    return EbpfEngine(where, options, chooses_sockets=chooses_sockets)


def _path(text: str) -> Path | None:
    return Path(text) if text else None

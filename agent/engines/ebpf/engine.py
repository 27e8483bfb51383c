"""The eBPF engine: destinations are changed in connect(), and listeners chosen when a connection arrives; no NAT."""

from __future__ import annotations

import difflib
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.engine_options import EngineOptions
from agent.engines.base import Applied, Footprint, Inspection, Removal, RuleCounter
from agent.engines.ebpf import btf, listeners, place, syscall
from agent.engines.ebpf.build import Build, build
from agent.engines.ebpf.contents import Contents, Settings, contents_for, describe
from agent.engines.ebpf.counters import read_counters
from agent.engines.ebpf.installed import Installed, Switch, clear_dead, is_dead, opened, targets, unpin
from agent.engines.ebpf.maps import fill, maps_for
from agent.engines.ebpf.place import Place
from agent.engines.ebpf.programs import POLICY_MAPS, PROGRAMS, Program
from agent.errors import ApplyError, HostError
from agent.policy import Cgroup, Policy

_MINIMUM = (5, 10)
_SETTLE_SECONDS = 0.02
_VERIFIER_LINES = 15
_SO_ORIGINAL_DST = 80
_REDIRECTING = ("sk_lookup", "connect4", "connect6", "sendmsg4", "sendmsg6")
_INSTEAD = "use --engine nftables or --engine iptables"


@dataclass(frozen=True, slots=True)
class EbpfPlan:
    """What the programs' maps hold for a policy."""

    contents: Contents
    cgroup: Cgroup | None = None
    """Whose connections are redirected; None means those of every process."""

    def render(self) -> str:
        """The programs and what their maps would hold, a line an entry."""
        lines = [f"program {program.name} on {program.scope.value}" for program in PROGRAMS]
        return "\n".join([*lines, *_listing(self.contents, 0)]) + "\n"


def _listing(contents: Contents, netns: int) -> list[str]:
    return sorted(
        f"map {name}: {describe(name, key, value)}"
        for name in POLICY_MAPS
        for key, value in contents.entries(name, netns).items()
    )


class EbpfEngine:
    """Carries plans out by eBPF programs on a cgroup and on the network namespace."""

    name = "ebpf"
    variant: str | None = None

    def __init__(self, where: Place, options: EngineOptions) -> None:
        self.where = where
        self.options = options
        self.reason = "this kernel has cgroup2, BTF and every type of eBPF program that is needed"

    def plan(self, policy: Policy) -> EbpfPlan:
        """The maps for a policy. Raises InputError for what eBPF cannot do."""
        return EbpfPlan(contents_for(policy), policy.cgroup)

    def preview(self, policy: Policy) -> str:
        """What `apply` would put into the kernel. Changes nothing."""
        return self.plan(policy).render()

    def footprint(self) -> Footprint:
        """Nothing: the programs are ours alone, and nothing else changes."""
        return {}

    def apply(self, plan: EbpfPlan) -> Applied:
        """Load the programs with maps of their own, fill these, and put them in place of any that run."""
        place.mount_bpffs(self.where.bpffs)
        here = place.netns()
        built = build(btf.definitions(btf.kernel(), cookie=here.is_cookie))
        clear_dead(self.where)
        folder = self.where.make_folder()
        try:
            with opened(folder) as before, maps_for(built, plan.contents, before) as maps:
                fill(maps, plan.contents, here.number)
                self._switch(built, plan, before, maps)
                if not before.links:
                    self._prove(folder, maps["anchor"])
                return Applied(("tpctl's programs (eBPF)",) if before.links else ())
        except OSError as error:
            raise ApplyError(f"the eBPF programs cannot be put in place: {error}") from error
        finally:
            with suppress(OSError):
                folder.rmdir()  # only goes when nothing was installed

    def _switch(self, built: Build, plan: EbpfPlan, before: Installed, maps: Mapping[str, int]) -> None:
        with ExitStack() as stack:
            loaded: dict[str, int] = {}
            for program in PROGRAMS:
                loaded[program.name] = _load(program, built.with_maps(program.name, maps))
                stack.callback(os.close, loaded[program.name])
            port = plan.contents.settings.inbound_port
            listeners.register(maps["listeners"], port)
            Switch(self.where, plan.cgroup, place.netns().inode).run(loaded, before)
            # Again, for those that began to listen before the new sockops program could see it.
            listeners.register(maps["listeners"], port)
            _announce_namespace()

    def _prove(self, folder: Path, anchor: int) -> None:
        """Raise ApplyError, with everything detached again, when the kernel does not run what it let us attach.

        Before Linux 5.15 a socket has one cgroup, and once a host has used net_cls or net_prio it is theirs.
        """
        if place.is_inside(self.where.top) and syscall.lookup(anchor, bytes(4), 8) == bytes(8):
            unpin(folder, tuple(program.name for program in PROGRAMS))
            raise ApplyError(
                "the eBPF programs were attached, but the kernel does not run them: on this host sockets belong to "
                f"another hierarchy of cgroups (net_cls or net_prio). They were taken away again; {_INSTEAD}"
            )

    def inspect(self, plan: EbpfPlan | None) -> Inspection:
        """What runs now, compared with `plan`. Raises HostError when it cannot be read."""
        try:
            with opened(self.where.folder) as found:
                if not found.links:
                    return Inspection(self.name, None, installed=False)
                drift = tuple(self._drift(plan, found)) if plan else ()
                return Inspection(self.name, None, True, _families(found), drift, _counters(found))
        except OSError as error:
            raise HostError(f"the eBPF programs cannot be read: {error}") from error

    def listening(self) -> int | None:
        """How many of the data plane's listening sockets inbound connections can go to; None when not installed."""
        with opened(self.where.folder) as found:
            waiting = found.maps.get("listeners")
            return None if waiting is None else listeners.registered(waiting)

    def _drift(self, plan: EbpfPlan, found: Installed) -> Iterator[str]:
        here = place.netns()
        try:
            expected = targets(self.where, plan.cgroup, here.inode)
        except FileNotFoundError:
            yield f"-the cgroup {plan.cgroup}, which is gone"
            return
        for program in PROGRAMS:
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
        wanted = _listing(plan.contents, here.number)
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
            return Removal(removed + _of_dead(dead))
        try:
            unpin(folder, tuple(name for name in names if name in _REDIRECTING))
            if names and draining:
                time.sleep(_SETTLE_SECONDS)
            unpin(folder, tuple(program.name for program in PROGRAMS))
            removed += _of_dead(clear_dead(self.where))
            for directory in (folder, folder.parent):
                with suppress(OSError):
                    directory.rmdir()
        except OSError as error:
            raise ApplyError(f"the eBPF programs under {folder} cannot be removed: {error.strerror}") from error
        return Removal(removed)


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


def _announce_namespace() -> None:
    """Let a program see a socket of this namespace: sk_lookup needs the kernel's name for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as any_socket, suppress(OSError):
        any_socket.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)


def _read(found: Installed, name: str) -> Iterator[tuple[bytes, bytes]]:
    descriptor = found.maps.get(name)
    if descriptor is None:
        return
    shape = syscall.map_info(descriptor).shape
    for key in syscall.keys(descriptor, shape.key_size):
        value = syscall.lookup(descriptor, key, shape.value_size)
        if value is not None:
            yield key, value


def _families(found: Installed) -> tuple[int, ...]:
    settings = [Settings.unpack(value)[0] for _, value in _read(found, "settings")]
    return tuple(number for number in (4, 6) if settings and f"ipv{number}" in settings[0].flags)


def _counters(found: Installed) -> tuple[RuleCounter, ...]:
    descriptor = found.maps.get("counters")
    return () if descriptor is None else tuple(read_counters(descriptor))


def _kernel() -> tuple[int, ...]:
    parts = os.uname().release.replace("-", ".").split(".")
    return tuple(int(part) for part in parts[:2] if part.isdecimal())


def load(
    options: EngineOptions | None = None,
    *,
    top: Path | None = None,
    pins: Path | None = None,
) -> EbpfEngine:
    """The engine for this host, or for what runs in the control group of a directory, `top`.

    `pins` is a BPF file system. Raises HostError, naming what was found and what is needed, when the host cannot do it;
    nothing was touched.
    """
    if not syscall.SUPPORTED or struct.pack("=H", 1) != b"\1\0":
        raise HostError(f"the eBPF engine does not know this machine ({os.uname().machine}); {_INSTEAD}")
    if _kernel() < _MINIMUM:
        needed = ".".join(map(str, _MINIMUM))
        raise HostError(f"this is Linux {os.uname().release}, and the eBPF engine needs {needed} or later; {_INSTEAD}")
    where = place.find(top, pins)
    btf.definitions(btf.kernel(), cookie=place.netns().is_cookie)
    return EbpfEngine(where, options or EngineOptions())

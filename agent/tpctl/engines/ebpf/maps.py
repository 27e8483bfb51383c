"""The maps that a set of programs runs with: new ones for the policy, those that run for what traffic has filled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from tpctl.bpf import syscall
from tpctl.bpf.build import Build
from tpctl.bpf.programs import KEPT_MAPS, MAPS, POLICY_MAPS, SOCKET_MAPS
from tpctl.engines.ebpf.contents import Contents, Settings, describe
from tpctl.engines.ebpf.installed import Installed
from tpctl.system.errors import ApplyError

IN_FLIGHT = 65536
"""Redirected connections that may be between their SYN and the data plane's accept at once."""


@contextmanager
def maps_for(built: Build, contents: Contents, before: Installed) -> Iterator[Mapping[str, int]]:
    """Descriptors of the maps to run with: new ones, or the running programs' where these are to be gone on with."""
    sizes = contents.sizes() | {"in_flight": IN_FLIGHT}
    kept = _kept(before, contents.settings)
    with ExitStack() as stack:
        made: dict[str, int] = {}
        for name in MAPS:
            shape = replace(built.shapes[name], max_entries=sizes.get(name, built.shapes[name].max_entries))
            if name in kept and syscall.map_info(kept[name]).shape == shape:
                made[name] = kept[name]
                continue
            made[name] = syscall.create_map(name, shape, typed=name in SOCKET_MAPS)
            stack.callback(os.close, made[name])
        yield made


def _kept(before: Installed, wanted: Settings) -> Mapping[str, int]:
    """The running programs' maps of what traffic fills."""
    kept = {name: before.maps[name] for name in KEPT_MAPS if name in before.maps}
    running = before.maps.get("settings")
    if "listeners" in kept and running is not None:
        raw = syscall.lookup(running, bytes(4), syscall.map_info(running).shape.value_size)
        if raw is None or Settings.unpack(raw)[0].inbound_port != wanted.inbound_port:
            del kept["listeners"]  # they listen on another port
    return kept


def fill(maps: Mapping[str, int], contents: Contents, netns: int) -> None:
    """Put a policy into its maps. Raises ApplyError."""
    for name in POLICY_MAPS:
        for key, value in contents.entries(name, netns).items():
            try:
                syscall.update(maps[name], key, value)
            except OSError as error:
                raise ApplyError(
                    f"the kernel refused an entry of the eBPF map {name} ({describe(name, key, value)}): "
                    f"{error.strerror}. Nothing was changed"
                ) from error

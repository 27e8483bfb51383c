"""What runs as the first process of a virtual machine: the eBPF engine's programs, and random policies compared."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
import time
import traceback
from pathlib import Path

_INIT_MODULE = 313
_POWER_OFF = 0x4321FEDC
_POLICIES = 12
_SECONDS = 3.0
"""How long an answer is waited for: the processor is emulated."""


def prepare() -> None:
    """The mounts and the one module that a rehearsal needs."""
    libc = ctypes.CDLL(None, use_errno=True)
    kinds = (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("bpf", "/sys/fs/bpf"))
    for kind, place in (*kinds, ("cgroup2", "/sys/fs/cgroup")):
        if libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None):
            print(f"{place}: {os.strerror(ctypes.get_errno())}")
    with Path("/veth.ko").open("rb") as module:
        if libc.syscall(_INIT_MODULE, module.fileno(), b"", 0):
            print(f"veth: {os.strerror(ctypes.get_errno())}")


def compare() -> int:
    """How many connections ended elsewhere than `decide()` says."""
    from agent import loopback
    from agent.engines.ebpf.engine import load
    from agent.policy import Dns, DnsCapture, Inbound, Policy, PortRange
    from agent.rehearsal.lab import Lab
    from agent.rehearsal.layout import HOST, stage
    from agent.rehearsal.probes import probes
    from agent.rehearsal.rehearse import attempt
    from tests.equivalence.run import drawn

    plain = Policy(5678, inbound=Inbound(exclude_ports=(PortRange(22),)), dns=Dns(DnsCapture.ALL))
    count = wrong = 0
    for policy in (plain, *drawn(_POLICIES, 1)):
        staging = stage(dataclasses.replace(policy, virtual_networks=(), drop_invalid=False, log_level=None))
        with Lab(staging.layout) as lab:
            with lab.inside(HOST):
                loopback.add("lo")
                engine = load()
                plan = engine.plan(staging.policy)
                engine.apply(plan)
                wrong += len(engine.inspect(plan).drift)
            lab.serve_data_plane(staging.policy)
            time.sleep(1)  # until the links are up
            for result in attempt(lab, staging.policy, probes(staging.policy, staging.layout), timeout=_SECONDS):
                count += 1
                if not result.ok:
                    wrong += 1
                    print(f"{result.probe.label}: expected {result.expected}, got {result.answer}", flush=True)
            with lab.inside(HOST):
                engine.remove()
    print(f"VERDICT {os.uname().release}: {count} connections, {wrong} wrong", flush=True)
    return wrong


def main() -> None:
    """Compare, say so on the console, and switch the machine off."""
    prepare()
    sys.path[:0] = ["/checkout", "/packages"]
    try:
        compare()
    except BaseException:  # noqa: BLE001 - the console is all there is
        traceback.print_exc()
    sys.stdout.flush()
    ctypes.CDLL(None).reboot(_POWER_OFF)


if __name__ == "__main__":
    main()

"""What runs as the first process of a virtual machine: the eBPF engine's programs, and random policies compared."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
import traceback
from pathlib import Path

_INIT_MODULE = 313
_POWER_OFF = 0x4321FEDC
_SECONDS = 3.0
"""How long an answer is waited for: the processor is emulated."""
_BYPASSING = 4
"""One policy in so many lets connections bypass an absent data plane."""


def prepare() -> None:
    """The mounts and modules that a rehearsal needs."""
    libc = ctypes.CDLL(None, use_errno=True)
    kinds = (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("bpf", "/sys/fs/bpf"))
    for kind, place in (*kinds, ("cgroup2", "/sys/fs/cgroup")):
        if libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None):
            print(f"{place}: {os.strerror(ctypes.get_errno())}")
    for module in sorted(Path("/modules").iterdir()):
        with module.open("rb") as opened:
            if libc.syscall(_INIT_MODULE, opened.fileno(), b"", 0):
                print(f"{module.name}: {os.strerror(ctypes.get_errno())}")


def compare(count: int) -> None:
    """Say how many connections ended elsewhere than `decide()` says, under so many random policies."""
    from tests.equivalence import harness, run
    from tests.equivalence.engines import ebpf_door
    from tpctl.spec.policy import WhenProxyDown

    for patience in ("NEGATIVE_SECONDS", "CONFIRM_SECONDS", "HASTY_SECONDS"):
        setattr(harness, patience, _SECONDS)
    harness._SETTLE_SECONDS *= 4
    policies = [
        dataclasses.replace(
            policy, when_proxy_down=WhenProxyDown.BLOCK if number % _BYPASSING else WhenProxyDown.BYPASS
        )
        for number, policy in enumerate(run.drawn(count, 1), 1)
    ]
    outcome = run.run(ebpf_door(), policies, lambda line: print(line, flush=True))
    if outcome.smallest:
        print(outcome.smallest)
    score = outcome.score
    print(
        f"VERDICT {os.uname().release}: {score.policies} policies, {score.connections} connections, "
        f"{len(outcome.wrong)} wrong",
        flush=True,
    )


def main() -> None:
    """Compare, say so on the console, and switch the machine off."""
    prepare()
    sys.path[:0] = ["/checkout", "/checkout/agent", "/packages"]
    try:
        compare(int(os.environ["TPCTL_POLICIES"]))  # the kernel makes variables of its command line's unknown words
    except BaseException:  # noqa: BLE001 - the console is all there is
        traceback.print_exc()
    sys.stdout.flush()
    ctypes.CDLL(None).reboot(_POWER_OFF)


if __name__ == "__main__":
    main()

"""The eBPF engine under other kernels, in virtual machines: `python -m tests.vm.ebpf [--policies N] [release...]`.

The kernels are those of Debian 11, 12 and 13, and are kept under /var/tmp/tpctl-vm. Needs qemu-system-x86 and a mirror
of Debian in apt's sources.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vm.debian import RELEASES
from tests.vm.initramfs import INTERPRETER, archive, files
from tests.vm.kernels import kernel

BOOT_SECONDS = 300.0
POLICY_SECONDS = 60.0
"""At most, on a machine that does something else too."""
_REGULAR_EXECUTABLE = 0o100755
_REGULAR = 0o100644


def boot(release: str, root: bytes, policies: int, timeout: float) -> str:
    """Everything the machine said."""
    chosen = kernel(release)
    own = {f"modules/{at:02d}-{name}.ko": (_REGULAR, raw) for at, (name, raw) in enumerate(chosen.modules)}
    with tempfile.NamedTemporaryFile(prefix="tpctl-vm-") as memory:
        # Archives may follow each other.
        memory.write(root + archive([], own))
        memory.flush()
        # rdrand: nothing else gives the kernel randomness so early, and Python does not start without.
        processor = ["-cpu", "Nehalem,-cx16,+rdrand", "-smp", "2"]
        machine = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", *processor, "-m", "3G"]
        words = f"console=ttyS0 quiet panic=-1 rdinit=/init TPCTL_POLICIES={policies}"
        start = ["-kernel", str(chosen.image), "-initrd", memory.name, "-append", words]
        done = subprocess.run(
            [*machine, "-nographic", "-no-reboot", *start],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    return done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")


def main() -> int:
    """0 when every kernel agreed on every connection."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("releases", nargs="*", choices=[[], *RELEASES], default=[])
    arguments.add_argument("--policies", type=int, default=12, help="random policies on each kernel")
    given = arguments.parse_args()
    guest = Path(__file__).with_name("guest.py").read_bytes()
    init = f"#!{INTERPRETER} -B\n".encode() + guest
    passwd = b"root:x:0:0:root:/root:/bin/sh\n"
    root = archive(files().items(), {"init": (_REGULAR_EXECUTABLE, init), "etc/passwd": (_REGULAR, passwd)})
    failed = 0
    for release in given.releases or RELEASES:
        said = boot(release, root, given.policies, BOOT_SECONDS + given.policies * POLICY_SECONDS)
        verdict = re.search(r"VERDICT (\S+): (.* (\d+) wrong)", said)
        if verdict and verdict[1].startswith(RELEASES[release]) and verdict[3] == "0":
            print(f"{release}: Linux {verdict[1]}: {verdict[2]}", flush=True)
        else:
            failed = 1
            print(f"{release}: failed\n{said[-5000:]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

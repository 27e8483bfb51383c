"""The eBPF engine under the kernels of Debian 11, 12 and 13, in virtual machines: `python -m tests.vm.ebpf [suite...]`.

Needs qemu-system-x86 and a mirror of Debian in apt's sources. Kernels are kept under /var/tmp/tpctl-vm. A kernel takes
two minutes.
"""

from __future__ import annotations

import lzma
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vm.debian import KEPT, RELEASES, apt
from tests.vm.initramfs import INTERPRETER, archive, files

TIMEOUT_SECONDS = 900
_REGULAR_EXECUTABLE = 0o100755
_REGULAR = 0o100644


def kernel(suite: str) -> tuple[Path, bytes]:
    """A suite's kernel image, and its veth module."""
    unpacked = KEPT / suite / "kernel"
    if not list(unpacked.glob("boot/vmlinuz-*")):
        apt(suite, "-q", "update")
        depends = apt(suite, "depends", "linux-image-cloud-amd64", program="apt-cache")
        package = re.findall(r"Depends: (linux-image-\S+)", depends)[0]
        apt(suite, "-q", "download", package)
        archive_file = max((KEPT / suite).glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", str(archive_file), str(unpacked)], check=True)
    image = max(unpacked.glob("boot/vmlinuz-*"))
    module = next(unpacked.glob("**/veth.ko*"))
    raw = module.read_bytes()
    return image, lzma.decompress(raw) if module.suffix == ".xz" else raw


def boot(suite: str, root: bytes) -> str:
    """Everything the machine said."""
    image, module = kernel(suite)
    with tempfile.NamedTemporaryFile(prefix="tpctl-vm-") as memory:
        # Archives may follow each other.
        memory.write(root + archive([], {"veth.ko": (_REGULAR, module)}))
        memory.flush()
        machine = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "3G", "-smp", "2"]
        start = ["-kernel", str(image), "-initrd", memory.name, "-append", "console=ttyS0 quiet panic=-1 rdinit=/init"]
        done = subprocess.run(
            [*machine, "-nographic", "-no-reboot", *start],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    return done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")


def main() -> int:
    """0 when every kernel agreed on every connection."""
    guest = Path(__file__).with_name("guest.py").read_bytes()
    init = f"#!{INTERPRETER} -B\n".encode() + guest
    passwd = b"root:x:0:0:root:/root:/bin/sh\n"
    root = archive(files().items(), {"init": (_REGULAR_EXECUTABLE, init), "etc/passwd": (_REGULAR, passwd)})
    failed = 0
    for suite in sys.argv[1:] or RELEASES:
        said = boot(suite, root)
        verdict = re.search(r"VERDICT (\S+): (\d+) connections, (\d+) wrong", said)
        if verdict and verdict[1].startswith(RELEASES[suite]) and verdict[3] == "0":
            print(f"{suite}: Linux {verdict[1]}: {verdict[2]} connections, none wrong", flush=True)
        else:
            failed = 1
            print(f"{suite}: failed\n{said[-5000:]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

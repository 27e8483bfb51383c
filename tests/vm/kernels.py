"""Kernels that virtual machines boot without any distribution around them, with the modules that a test needs."""

from __future__ import annotations

import lzma
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vm.debian import KEPT, apt

_WANTED = (
    "veth", "nf_tables", "nf_conntrack", "nf_conntrack_netlink", "nf_nat", "nft_chain_nat", "nft_ct", "nft_redir",
    "nft_counter", "nft_log", "nft_fib", "nft_fib_ipv4", "nft_fib_ipv6", "nft_fib_inet", "nft_socket",
    "nf_log_syslog", "nf_log_ipv4", "nf_log_ipv6", "crc32c_generic",
)  # fmt: skip
"""Without those that a kernel has built in, or does not know."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image and the modules to load, in this order."""

    image: Path
    modules: tuple[tuple[str, bytes], ...]


def kernel(release: str) -> Kernel:
    """The kernel of a release. Raises RuntimeError or OSError when it cannot be had."""
    unpacked = KEPT / release / "kernel"
    if not list(unpacked.glob("boot/vmlinuz-*")):
        subprocess.run(["dpkg", "-x", str(_downloaded(release)), str(unpacked)], check=True)
    found = {_name(path): path for path in unpacked.glob("**/*.ko*")}
    wanted = dict.fromkeys(needed for name in _WANTED for needed in _with_needs(name, found))
    return Kernel(max(unpacked.glob("boot/vmlinuz-*")), tuple((name, _content(found[name])) for name in wanted))


def _downloaded(release: str) -> Path:
    apt(release, "-q", "update")
    depends = apt(release, "depends", "linux-image-cloud-amd64", program="apt-cache")
    package = re.findall(r"Depends: (linux-image-\S+)", depends)[0]
    apt(release, "-q", "download", package)
    return max((KEPT / release).glob(f"{package}_*.deb"))


def _name(path: Path) -> str:
    return path.name.split(".", 1)[0].replace("-", "_")


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    return lzma.decompress(raw) if path.suffix == ".xz" else raw


def _with_needs(name: str, found: dict[str, Path]) -> Iterator[str]:
    """A module after those that it needs; nothing when there is none of that name."""
    if name not in found:
        return
    needs = re.search(rb"(?:\0|^)depends=([^\0]*)\0", _content(found[name]))
    for needed in needs[1].decode().split(",") if needs else ():
        yield from _with_needs(needed.replace("-", "_"), found)
    yield name

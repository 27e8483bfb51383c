"""`python -m delivery.oci`: dist/tpctl-VERSION.oci.tar, an image with tpctl and what it needs of Debian 12.

Needs root, mmdebstrap, buildah and a mirror of Debian. Unlike the packages it is not the same each time: the mirror has
newer versions.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from delivery import DIST, NAME, SUMMARY, deb, epoch
from tpctl import __version__

RELEASE = "bookworm"
"""What a newer nft writes into the kernel, the nft of a Debian 12 host crashes over when it lists tables."""
INCLUDED = (
    *("python3-click", "python3-structlog", "python3-pyroute2", "python3-yaml", "python3-dnspython"),
    *("python3-nftables", "nftables", "iptables", "iproute2"),
)
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*", "/var/cache/apt/*")


def build(folder: Path = DIST) -> Path:
    """Build it. Raises subprocess.CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{NAME}-{__version__}.oci.tar"
    made.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as work:
        system = Path(work, "system.tar")
        _system(deb.build(Path(work)), system)
        _image(system, made, Path(work))
    return made


def _system(package: Path, system: Path) -> None:
    """The files of the image: what is essential in Debian, without apt, and the package."""
    hooks = (
        f'cp "{package}" "$1/{package.name}"',
        f'chroot "$1" dpkg --install "/{package.name}" >/dev/null',
        f'rm "$1/{package.name}"',
        # Users have to exist where tpctl is called; this is Kuma's usual one.
        """echo kuma-dp:x:5678:5678::/:/usr/sbin/nologin >>"$1/etc/passwd"; echo kuma-dp:x:5678: >>"$1/etc/group" """,
    )
    words = ["mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(INCLUDED)}"]
    words += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    words += [f"--customize-hook={hook}" for hook in hooks]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch())}
    # A build that is killed leaves no mounts behind.
    alone = ["unshare", "--mount", "--propagation", "private"]
    subprocess.run([*alone, *words, RELEASE, str(system)], env=environment, check=True)


def _image(system: Path, made: Path, work: Path) -> None:
    """One layer, and what runs."""
    buildah = ["buildah", "--root", str(work / "storage"), "--runroot", str(work / "run"), "--storage-driver", "vfs"]

    def run(*words: str) -> str:
        return subprocess.run([*buildah, *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    container = run("from", "scratch")
    run("add", container, str(system), "/")
    labels = {"title": NAME, "version": __version__, "description": SUMMARY, "licenses": "Apache-2.0"}
    settings = [f"--annotation=org.opencontainers.image.{name}={value}" for name, value in labels.items()]
    run("config", '--entrypoint=["/usr/bin/tpctl"]', "--cmd=--help", *settings, container)
    place = f"oci-archive:{made}:{NAME}:{__version__}"
    run("commit", "--quiet", "--rm", "--timestamp", str(epoch()), "--format", "oci", container, place)


if __name__ == "__main__":
    print(build())

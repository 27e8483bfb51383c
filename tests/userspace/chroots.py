"""Chroots of Debian with what `make dev` asks for, kept under /var/tmp/tpctl-userspace.

They are not written to: a run has a layer of its own over one, see `room`. Needs root, mmdebstrap, and a mirror in
apt's sources.
"""

from __future__ import annotations

import datetime
import hashlib
import subprocess
import tempfile
from pathlib import Path

from tests.vm import debian

CHECKOUT = Path(__file__).resolve().parents[2]
KEPT = Path("/var/tmp/tpctl-userspace")
RELEASES = ("bookworm", "trixie", "unstable")
"""Debian 12 and 13, and what comes after."""
MOVING = "unstable"
_MORE = ("ca-certificates", "make", "python3-pyroute2")
"""Beside what the Makefile lists. Debian's own pyroute2 is used wherever it is new enough."""
_OPTIONS = {MOVING: ('--aptopt=Acquire::Check-Valid-Until "false"',)}
"""A mirror that is not renewed each day has an old Release file."""
_USERS = 'chroot "$1" useradd --system --uid 5678 --user-group --no-create-home kuma-dp'


def chroot(release: str) -> Path:
    """The chroot of a release, built unless it is there already. Raises RuntimeError with what mmdebstrap said."""
    return _built(release, (*_packages(), *_MORE), (*_OPTIONS.get(release, ()), f"--customize-hook={_USERS}"))


def bare_chroot(release: str) -> Path:
    """One with nothing that apt does not need, where man pages and documents are installed with packages."""
    return _built(release, ("ca-certificates",), _OPTIONS.get(release, ()), left_out=())


def _built(
    release: str, packages: tuple[str, ...], options: tuple[str, ...], left_out: tuple[str, ...] = debian.LEFT_OUT
) -> Path:
    found = KEPT / "chroots" / f"{release}-{_key(packages, options, left_out, _week() if release == MOVING else '')}"
    with debian.alone(KEPT / f"{release}.lock"):
        if not found.exists():
            found.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="building-", dir=KEPT) as work:
                debian.debootstrap(release, packages, Path(work, "root"), options, left_out)
                Path(work, "root").rename(found)
        found.touch()
        debian.forget_unused(found.parent)
    return found


def _packages() -> tuple[str, ...]:
    """Those that the Makefile lists for `make dev`."""
    words = ["make", "--silent", "--no-print-directory", "--eval=listed: ; @echo $(DEV_PACKAGES)", "listed"]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return tuple(done.stdout.split())


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _week() -> str:
    """What has no version is made anew each week."""
    return "-".join(map(str, datetime.datetime.now(datetime.UTC).isocalendar()[:2]))

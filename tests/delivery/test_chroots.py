"""The packages in bare chroots of Debian 12 and 13, the image by podman: `make test-packages`.

Needs root, mmdebstrap, and a mirror.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from delivery import DIST, NAME, deb, oci, python, rpm
from tests.userspace.chroots import CHECKOUT, bare_chroot
from tests.userspace.room import Room
from tpctl import __version__

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.environ.get("PACKAGES"), reason="minutes, and a mirror: `make test-packages`"),
]
HERE = Path(__file__).parent.relative_to(CHECKOUT)
RELEASES = ("bookworm", "trixie")
HELD = "== all of it held\n"


def said(release: str, script: str, *packages: Path) -> str:
    """What a script prints that is given a package, in the bare chroot of a release."""
    with Room(bare_chroot(release)) as room:
        given = (f"./{package.relative_to(CHECKOUT)}" for package in packages)
        done = room.run("sh", f"{HERE}/{script}", *given, seconds=1800)
    print(done.stdout)
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("release", RELEASES)
def test_the_debian_package(release: str) -> None:
    assert said(release, "debian.sh", deb.build()).endswith(HELD)


@pytest.mark.parametrize("release", RELEASES)
def test_readme_and_tutorial_as_a_stranger_types_them(release: str) -> None:
    assert said(release, "pages.sh", deb.build()).endswith(HELD)


@pytest.mark.parametrize("release", RELEASES)
def test_the_wheel_without_a_compiler(release: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        python.export(Path(work))
        made = python.wheel(Path(work), DIST)
    assert said(release, "wheel.sh", made).endswith(HELD)


def test_the_tree_of_the_rpm_package() -> None:
    assert said("bookworm", "rpm.sh", rpm.build()).endswith(HELD)


@pytest.mark.parametrize("release", RELEASES)
def test_the_demo_in_a_clone_without_a_compiler(release: str) -> None:
    assert said(release, "clone.sh").endswith(HELD)


def test_the_image_as_podman_runs_it() -> None:
    alone = ["unshare", "--net", "--ipc", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc"]
    here = Path("/proc/self/ns/net").readlink()
    # podman takes no long path: where the tests' own folders are may be too deep.
    with tempfile.TemporaryDirectory(prefix="tpctl-", dir="/tmp") as work:
        image = oci.build(Path(work))
        script = ["sh", CHECKOUT / HERE / "image.sh", image, f"{NAME}:{__version__}", work, here]
        words = ["setpriv", "--pdeathsig", "KILL", *alone, "--kill-child", *map(str, script)]
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False
        )
    print(done.stdout)
    assert done.returncode == 0
    assert done.stdout.endswith(HELD)

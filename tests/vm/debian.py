"""The mirror of Debian that this machine uses, and how it is reached."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

KEPT = Path("/var/tmp/tpctl-vm")
"""What takes long to make and may be used again."""
UNUSED_SECONDS = 7 * 24 * 3600
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*")
RELEASES = {"bullseye": "5.10", "bookworm": "6.1", "trixie": "6.12"}
"""Debian 11, 12 and 13, and what their kernels' versions begin with."""


def mirror() -> str:
    """The mirror that apt uses: it has every release. Raises RuntimeError when there is none."""
    listed = _said("apt-get", "indextargets", "--format", "$(SITE)")
    for site in listed.split():
        if "security" not in site:
            return site
    raise RuntimeError("apt has no mirror in its sources")


def reached_by() -> list[str]:
    """apt's settings about proxies and certificates, one `Name "value";` each."""
    settings = _said("apt-config", "dump", "--format", '%f "%v";%n', "Acquire::http", "Acquire::https").splitlines()
    return [one for one in settings if not one.endswith('"";')]


def apt(release: str, *arguments: str, program: str = "apt-get", sources: str = "deb") -> str:
    """apt with lists and a cache of its own: the machine's are not touched. `sources` is "deb" or "deb-src"."""
    place = KEPT / (release if sources == "deb" else f"{release}-src")
    for name in ("lists/partial", "cache/archives/partial"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "sources.list").write_text(f"{sources} {mirror()} {release} main\n")
    options = {
        "Dir::Etc::SourceList": place / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": place / "lists",
        "Dir::Cache": place / "cache",
        "APT::Sandbox::User": "root",
    }
    settings = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return _said(program, *settings, *arguments, cwd=place)


def debootstrap(
    release: str, packages: Iterable[str], root: Path, options: Iterable[str] = (), left_out: Iterable[str] = LEFT_OUT
) -> None:
    """Unpack a release with these packages into `root`. Raises RuntimeError with what mmdebstrap said."""
    settings = [f"--dpkgopt=path-exclude={pattern}" for pattern in left_out]
    settings += [f"--aptopt={setting}" for setting in reached_by()]
    # INITRD: the kernel's package shall not make one.
    words = ["env", "INITRD=No", "mmdebstrap", "--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io"]
    words += [f"--include={','.join(packages)}", *settings, *options, release, str(root), mirror()]
    # A build that is killed leaves no mounts behind.
    _said("unshare", "--mount", "--propagation", "private", *words)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time builds what this file stands for."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget_unused(folder: Path) -> None:
    """Remove what nobody has used for a week: recipes change, and what they make is large."""
    for one in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process builds there
            if time.time() - one.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(one)


def _said(*words: str, cwd: Path | None = None) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} exited with {done.returncode}:\n{done.stderr}")
    return done.stdout

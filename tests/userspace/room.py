"""A release's chroot with the checkout and a virtual environment of its own in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from tests.userspace.chroots import CHECKOUT, KEPT

SCRIPT = Path(__file__).with_name("room.sh")
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PIP_ROOT_USER_ACTION": "ignore",
}
_PIP_FILES = ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
_PREFIX = "run-"
_COPY = "cd /checkout && tar -cf - --exclude=./.venv --exclude=./.git --exclude=__pycache__ . | tar -xf - -C /tpctl"


class Room:
    """Use as a context manager: what was written goes at the end. pip reaches its index as it does on this machine."""

    def __init__(self, chroot: Path) -> None:
        self.chroot = chroot

    def __enter__(self) -> Self:
        _sweep()
        self._layer = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=KEPT))
        self._held = os.open(self._layer, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        try:
            copied = self.run("sh", "-c", _COPY)
            if copied.returncode:
                raise RuntimeError(f"the checkout cannot be copied into {self.chroot}:\n{copied.stdout}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._layer)
        os.close(self._held)

    def run(self, *command: str, seconds: float = 3600) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy of the checkout; what it prints on either stream is its `stdout`.

        Raises subprocess.TimeoutExpired; everything that runs in the room has then been killed.
        """
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
        named = [part for value in pip.values() for part in value.split() if part.startswith("/")]
        alone = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        around = ["setpriv", "--pdeathsig", "KILL", "unshare", *alone, str(SCRIPT)]
        return subprocess.run(
            [*around, str(self.chroot), str(self._layer), str(CHECKOUT), "env", "--chdir=/tpctl", *command],
            env={**pip, **_ENVIRONMENT, "SHARED": "\n".join((*_PIP_FILES, *named))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )


def _sweep() -> None:
    """Remove what a run that was killed has left: nobody holds its folder any more."""
    for left in KEPT.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            held = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(held)

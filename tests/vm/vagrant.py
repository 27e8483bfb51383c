"""A machine that Vagrant runs, driven by the same scenarios: `VM_PROVIDER=vagrant pytest tests/vm`.

Where libvirt must not run on the machine itself: `tests/vm/confined.sh env VM_PROVIDER=vagrant ...` (docs/vagrant.md).
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Self

from tests.vm.images import Image
from tests.vm.machine import Machine

PATIENCE_SECONDS = 1200
_HERE = Path(__file__).parent


class VagrantMachine(Machine):
    """The machine that tests/vm/Vagrantfile has for a release. Use as a context manager: it is destroyed in the end."""

    def __init__(self, release: str, folder: Path) -> None:
        super().__init__(Image(folder), folder)
        self.release = release

    def __enter__(self) -> Self:
        self.vagrant("up", "--provider=libvirt")
        found = dict(line.split(maxsplit=1) for line in self.vagrant("ssh-config").splitlines() if line.strip())
        (self.folder / "key").symlink_to(shlex.split(found["IdentityFile"])[0])
        # The first setting of each name counts.
        self._ssh_options[:0] = ["-o", f"HostName={found['HostName']}", "-o", f"Port={found['Port']}"]
        self.wait_until_up()
        return self

    def __exit__(self, *_: object) -> None:
        self._hang_up()
        self.vagrant("destroy", "--force")

    @property
    def console(self) -> str:
        """What Vagrant knows of it."""
        return self.vagrant("status")

    def reboot(self) -> None:
        """Halt it, start it, and wait until it is up again."""
        self._hang_up()
        self.vagrant("reload", "--no-provision")
        self.wait_until_up()

    def keep(self, name: str) -> None:
        """Remember the state of memory and disk, for `go_back`."""
        self._hang_up()
        self.vagrant("snapshot", "save", "--force", name)

    def go_back(self, name: str) -> None:
        """Make everything as it was at `keep`. Open sessions are lost."""
        self._hang_up()
        self.vagrant("snapshot", "restore", "--no-provision", name)
        self.wait_until_up()  # it is another process of qemu's, and the bridge has to learn where it is

    def vagrant(self, *words: str) -> str:
        """Run Vagrant for this machine, and keep what it says in `folder`. AssertionError with that when it fails."""
        before_name = 2 if words[0] == "snapshot" else 1
        argv = ["vagrant", *words[:before_name], self.release, *words[before_name:]]
        done = subprocess.run(
            argv,
            cwd=_HERE,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        said = f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}"
        with (self.folder / "vagrant.log").open("a") as log:
            log.write(said)
        assert not done.returncode, said
        return done.stdout

"""A host whose whole cgroup hierarchy is one cgroup of the test's own, for `--engine ebpf` by the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.netns.lab import run
from tpctl.rehearsal.cgroup import own_place

# In a cgroup namespace, what is mounted as the root of cgroup2 is the cgroup the process was in.
OWN_ROOT = """
set -e
mount --make-rprivate /
for mounted in $(awk '$3 == "cgroup2" { print $2 }' /proc/self/mounts); do umount -l "$mounted"; done
mkdir -p "$1/cgroup"
mount -t cgroup2 none "$1/cgroup"
mount --bind "$1/pins" /sys/fs/bpf
shift
exec "$@"
"""


class Host:
    """Runs the command where eBPF programs can only reach the test's own cgroup."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        around = ["unshare", "--cgroup", "--mount", "sh", "-c", OWN_ROOT, "sh", self.folder]
        return run([*around, *words], check=False)

    def tpctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "tpctl.cli.main", *arguments)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.tpctl("status", "--json").stdout)
        return found


@contextmanager
def own_host(folder: Path) -> Iterator[Host]:
    """The host for a block; this process is in its control group meanwhile."""
    with own_place() as place:
        (folder / "pins").mkdir()
        run(["mount", "--bind", str(place.pins), str(folder / "pins")])
        try:
            yield Host(str(folder))
        finally:
            run(["umount", str(folder / "pins")])

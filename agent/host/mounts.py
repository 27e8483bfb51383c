"""Where file systems are mounted (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from pathlib import Path

INIT = Path("/proc/1")
_ESCAPED = re.compile(r"\\([0-7]{3})")
"""How the kernel writes a space, tab, newline or backslash of a path."""


def mounts(process: str, kind: str) -> list[Path]:
    """Where file systems of a kind are mounted, in a process's view. Raises OSError."""
    found = []
    for line in Path("/proc", process, "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == kind:
            found.append(Path(_ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), before.split(" ")[4])))
    return found


def mount_numbers(process: str) -> set[str]:
    """The ids of what a process sees mounted. No two mount namespaces have one in common. Raises OSError."""
    lines = Path("/proc", process, "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return {line.split(" ", 1)[0] for line in lines}

"""Where file systems are mounted (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tpctl.system import text
from tpctl.system.errors import HostError

INIT = Path("/proc/1")
_FIRST = INIT / "root"
_ESCAPED = re.compile(r"\\([0-7]{3})")
"""How the kernel writes a space, tab, newline or backslash of a path."""


def mounts(process: str, kind: str) -> list[Path]:
    """Where file systems of a kind are mounted, in a process's view. Raises OSError."""
    found = []
    for line in text.lines(text.read(Path("/proc", process, "mountinfo"))):
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == kind:
            place = _ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), before.split(" ")[4])
            found.append(Path(os.fsdecode(text.encoded(place))))
    return found


def mount_numbers(process: str) -> set[str]:
    """The ids of what a process sees mounted. No two mount namespaces have one in common. Raises OSError."""
    return {line.split(" ", 1)[0] for line in text.lines(text.read(Path("/proc", process, "mountinfo")))}


def of_first(place: Path) -> Path:
    """A place in the view of process 1, by way of its root directory. Raises HostError when that is out of reach.

    Whoever has fewer capabilities than process 1, and not CAP_SYS_PTRACE, sees its mounts but may not follow the link
    (proc_pid_root(5), PTRACE_MODE_READ_FSCREDS of ptrace(2)).
    """
    path = _FIRST / place.relative_to("/")
    try:
        path.stat()
    except OSError as error:
        raise HostError(f"{place} of this host is out of reach ({path}: {error.strerror})") from error
    return path

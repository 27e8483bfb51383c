"""The units that let the redirection follow resolv.conf: a path unit, and the service it starts (systemd.path(5)).

Addresses need no watching: both families are redirected, whether or not the host has an address.
"""

from __future__ import annotations

import os
from pathlib import Path

PATH, SERVICE = "tpctl-resolv.path", "tpctl-resolv.service"
UNITS = (PATH, SERVICE)
LINK = f"tpctl.service.wants/{PATH}"
"""Enables the path unit; below the folder of units."""
RESOLV_CONF = "/etc/resolv.conf"
_SHIPPED = f"PathChanged={RESOLV_CONF}\n"
_MOST_LINKS = 8


def chain(file: str, root: Path) -> tuple[str, ...]:
    """What has to be watched for a file, as paths of the system below `root`.

    The file itself and what it leads to, link by link; and the folder of each link, because a path unit takes only a
    change of what a link leads to for a change (path_spec_fd_event() in systemd's src/core/path.c).
    """
    found = [os.path.normpath(file)]
    folders: list[str] = []
    while len(found) <= _MOST_LINKS:
        try:
            target = (root / found[-1].lstrip("/")).readlink()
        except OSError:
            break
        folders.append(str(Path(found[-1]).parent))
        following = os.path.normpath(Path(found[-1]).parent / target)
        if following in found:
            break
        found.append(following)
    return tuple(dict.fromkeys([*found, *folders]))


def naming(text: str, watched: tuple[str, ...]) -> str:
    """The path unit that watches these files."""
    lines = "".join(f"PathChanged={path.replace('%', '%%')}\n" for path in watched if path.isprintable())
    return text.replace(_SHIPPED, lines or _SHIPPED)

"""The code that is tested is there wherever it lies: in a folder that is hidden, or that others may not look into."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT_DIRECTORY = Path(__file__).resolve().parents[1]
CODE = tuple(
    place
    for place in (ROOT_DIRECTORY, Path(sys.prefix))
    if place == ROOT_DIRECTORY or not place.is_relative_to(ROOT_DIRECTORY)
)
"""The checkout, and its environment if that is elsewhere."""
OPEN = Path("/run/tpctl-code")
"""Where a run of the tests shows it to every user (tests/isolation.py), in the same order."""
_FIRST_DESCRIPTOR = 7


def opened(path: Path) -> Path:
    """The path by which every user may reach a file of the code, if there is one."""
    shown = _shown(path)
    return shown if shown.exists() else path


def _shown(path: Path) -> Path:
    for number, place in enumerate(CODE):
        if path.is_relative_to(place):
            return OPEN / str(number) / path.relative_to(place)
    return path


def anybodys_python() -> tuple[str, dict[str, str]]:
    """The interpreter with the tested package, for a process that is not root's: its path and its environment."""
    return str(opened(Path(sys.executable))), {**os.environ, "PYTHONPATH": str(opened(ROOT_DIRECTORY) / "agent")}


def shown_python() -> list[str]:
    """What to put before the arguments of that interpreter in a mount namespace that has an empty /run of its own."""
    show = "".join(
        f"mountpoint -q {where} || {{ mkdir -p {where} && mount --rbind {shlex.quote(str(place))} {where}; }}\n"
        for place, where in ((place, shlex.quote(str(_shown(place)))) for place in CODE)
    )
    package = shlex.quote(str(_shown(ROOT_DIRECTORY) / "agent"))
    return ["sh", "-ec", f'{show}PYTHONPATH={package} exec "$@"', "sh", str(_shown(Path(sys.executable)))]


def hide(folder: str, options: str = "mode=755") -> str:
    """Shell commands that mount an empty file system over a folder; code below it is there again, under its own path.

    For a script that stops at the first error, in a mount namespace of its own.
    """
    kept = [(number, place) for number, place in enumerate(CODE, _FIRST_DESCRIPTOR) if place.is_relative_to(folder)]
    mount = f"mount -t tmpfs -o {options} none {shlex.quote(folder)}"
    before = [grasp(number, place) for number, place in kept]
    after = [*(put(number, place) for number, place in kept), f"cd {shlex.quote(str(ROOT_DIRECTORY))}"]
    return "\n".join([*before, mount, *(after if kept else ())])


def grasp(descriptor: int, place: Path) -> str:
    """A shell command after which a folder can be `put` elsewhere, also when something has been mounted over it."""
    return f"exec {descriptor}<{shlex.quote(str(place))}"


def put(descriptor: int, place: Path) -> str:
    """Shell commands that show a folder that was grasped in another place."""
    where = shlex.quote(str(place))
    # The descriptor leads to the folder itself, and its path, to which mount(8) would resolve it, elsewhere by now.
    mount = f"mount --no-canonicalize --rbind /proc/self/fd/{descriptor} {where}"
    return f"mkdir -p {where} && {mount} && exec {descriptor}<&-"

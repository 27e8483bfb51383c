"""The commands of a campaign: where each begins, what is typed, where it ends, and which of the two the host is in."""

from __future__ import annotations

from collections.abc import Iterator

from tests.crash.scene import Done, Scene
from tests.crash.server import CONFIRM_WITHIN

ORDINARY = ("install", "swap", "uninstall", "apply")
AWAITED = ("install within", "swap within", "uninstall within", "confirm", "rollback")
"""What `--confirm-within` adds: a change that awaits its confirmation, its confirmation, and its way back."""
COMMANDS = (*ORDINARY, *AWAITED)
ROLLED_BACK = ("install", "swap", "apply")
"""What goes back when a step fails."""
BEGINNING = {
    "install": "none", "swap": "old", "uninstall": "old", "apply": "none",
    "install within": "none", "swap within": "old", "uninstall within": "old", "confirm": "new", "rollback": "new",
}  # fmt: skip
END = {
    "install": "new", "swap": "new", "uninstall": "none", "apply": "old",
    "install within": "new", "swap within": "new", "uninstall within": "none", "confirm": "new", "rollback": "old",
}  # fmt: skip
WAY_BACK = {
    "install within": "none", "swap within": "old", "uninstall within": "old", "confirm": "none", "rollback": "old",
}  # fmt: skip
"""What is there again when the time is up."""
KEPT = {
    "install within": "new", "swap within": "new", "uninstall within": "none", "confirm": "new", "rollback": "new",
}  # fmt: skip
"""What a confirmation keeps."""
LONG = (CONFIRM_WITHIN, "600s")
SHORT = (CONFIRM_WITHIN, "6s")
"""Longer than a trial takes until the command is interfered with, also on a busy machine."""


def argv(scene: Scene, command: str, within: tuple[str, ...] = LONG) -> tuple[str, ...]:
    """What is typed."""
    if command in ("install", "swap"):
        return scene.argv("new")
    if command in ("install within", "swap within"):
        return (*scene.argv("new"), *within)
    return ("uninstall", *within) if command == "uninstall within" else (command,)


def begin(scene: Scene, command: str, within: tuple[str, ...] = LONG) -> None:
    """Bring the host, on which nothing is installed, to where the command begins."""
    if command in ("swap", "uninstall", "apply", "swap within", "uninstall within", "rollback"):
        scene.install("old")
    if command == "apply":
        scene.lose_rules()
    if command in ("confirm", "rollback"):
        scene.host.ok(*scene.argv("new"), *within)
    scene.forget()


def points_of(scene: Scene, command: str) -> tuple[str, ...]:
    """The points of an undisturbed run."""
    begin(scene, command)
    done = scene.host.ok(*argv(scene, command))
    scene.uninstall()
    return done.points


def judged(scene: Scene, command: str) -> tuple[str, str]:
    """The state that connections see, and those that are not as in the old one.

    A confirmation changes no connection; its old state is the one in which the change still awaits it.
    """
    seen = scene.seen()
    old, new = scene.expected(BEGINNING[command]), scene.expected(END[command])
    if seen == old:
        return ("old" if command != "confirm" or scene.is_pending() else "new"), ""
    if seen == new:
        return "new", ""
    wrong = {name: seat for name, seat in seen.items() if seat not in (old[name], new[name])}
    if wrong:
        return "wrong", ", ".join(f"{name}: {seat}" for name, seat in wrong.items())
    return "between", "as after already: " + ", ".join(n for n in seen if seen[n] == new[n] != old[n])


def awaits_wrongly(scene: Scene, command: str, done: Done) -> Iterator[str]:
    """A command that could end has to leave a change that awaits confirmation exactly when it says so."""
    if command not in AWAITED or done.exit < 0 or "pending.json, cannot be removed" in done.err:
        return
    awaits = scene.is_pending()
    if awaits != (done.exit == 0) if command.endswith("within") else awaits == (done.exit == 0):
        yield f"exit {done.exit}, but {'a' if awaits else 'no'} change awaits confirmation: {done.err.strip()}"


def left_behind(scene: Scene, command: str, done: Done) -> Iterator[str]:
    """Where nothing was, an install that failed has left nothing (but records, and empty folders), or says so."""
    if command == "install" and done.exit in (1, 2) and "failed too" not in done.err:
        held, base = (
            {name: text for name, text in one.items() if not name.startswith("/run") and not name.endswith("/")}
            for one in (scene.held(), scene.base)
        )
        if held != base:
            yield f"exit {done.exit}, but it has left {difference(held, base)}: {done.err.strip()}"


def difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """What two states differ in, for a message."""
    lines = [f"{name}: {text!r}" for name, text in found.items() if wanted.get(name) != text]
    return "\n      ".join([*lines, *(f"missing: {name}" for name in wanted if name not in found)])[:3000]

"""What an operator does after a command was interfered with, and whether the host is then as it has to be."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tests.crash.commands import AWAITED, KEPT, LONG, WAY_BACK, difference
from tests.crash.scene import Done, Scene
from tests.crash.server import HANG, KILL_ALL

INSTALL, UNINSTALL = "install", "uninstall"
ANEW = "install within, confirm"
CONFIRM = "confirm, install"
WAIT = "wait until the time is up"
LATE = "install when the time has been up for long"
_GUARDIAN_ENDS_SECONDS = 60.0
"""It looks every second; the rest is for a busy machine."""
_TIME_IS_UP_SECONDS = 60.0


def ways_to_heal(command: str, how: str) -> tuple[str, ...]:
    """What may come after a command that was interfered with.

    A guardian that was killed too takes nothing back in time, so the next install has to; of a call that hangs nobody
    knows whether it or the guardian comes first.
    """
    if command not in AWAITED:
        return INSTALL, UNINSTALL
    always = (INSTALL, ANEW, CONFIRM, UNINSTALL)
    return always if how == HANG else (*always, LATE if how == KILL_ALL else WAIT)


def healed(scene: Scene, command: str, healing: str) -> Iterator[str]:
    """Heal a host; then leave it bare for the next trial. Hands back what went wrong."""
    name = "old" if command in ("uninstall", "apply", "uninstall within", "rollback") else "new"
    if healing == CONFIRM:
        yield from _confirmed(scene, command)
    if healing == WAIT:
        yield from _taken_back(scene, command)
    elif healing != UNINSTALL:
        yield from _installed(scene, command, name, healing)
    done = scene.host("uninstall")
    if done.exit != 0:
        yield f"the next uninstall fails: {done}"
        scene.host("uninstall")
    if command in AWAITED:
        yield from (f"still running: {one}" for one in scene.host.leave(_GUARDIAN_ENDS_SECONDS))
    held = scene.held()
    if held != scene.base:
        yield f"the next uninstall leaves: {difference(held, scene.base)}"
        scene.mend(held)


def _installed(scene: Scene, command: str, name: str, healing: str) -> Iterator[str]:
    within = LONG if healing == ANEW else ()
    if healing == LATE:
        scene.let_time_pass()
    if within:
        time.sleep(1.0)  # a record knows its second, and of two that are equal the way back is taken to be gone already
    done = scene.host(*scene.argv(name), *within)
    if command in AWAITED and healing not in (ANEW, LATE) and _is_refused(done):
        yield from _rolled_back(scene, command)
        done = scene.host(*scene.argv(name))
    if done.exit == 0 and scene.is_pending():  # it may have changed nothing; then the other one goes on waiting
        done = scene.host("confirm")
    if done.exit != 0:
        yield f"the next install fails: {done}"
    elif (seen := scene.seen()) != scene.expected(name):
        yield f"after the next install connections end elsewhere: {difference(seen, scene.expected(name))}"
    elif complaints := scene.complaints():
        yield f"after the next install `tpctl status` finds {complaints}"
    if scene.is_pending():
        yield "after the next install a change still awaits confirmation"
    yield from scene.litter()


def _confirmed(scene: Scene, command: str) -> Iterator[str]:
    """A confirmation keeps the change, or is refused; it never calls kept what is not there."""
    done = scene.host("confirm")
    if done.exit not in (0, 2):
        yield f"a confirmation fails: {done}"
    if done.exit != 0:
        return
    if (seen := scene.seen()) != scene.expected(KEPT[command]):
        yield f"confirmed, connections end elsewhere: {difference(seen, scene.expected(KEPT[command]))}"
    if complaints := scene.complaints():
        yield f"confirmed, `tpctl status` finds {complaints}"


def _is_refused(done: Done) -> bool:
    """An install without --confirm-within says what to do first while another one awaits its confirmation."""
    return done.exit == 2 and "tpctl rollback" in done.err


def _rolled_back(scene: Scene, command: str) -> Iterator[str]:
    done = scene.host("rollback")
    if done.exit != 0:
        yield f"the next rollback fails: {done}"
    yield from _is_back(scene, command)


def _taken_back(scene: Scene, command: str) -> Iterator[str]:
    """Left alone. Without a record of a change that awaits confirmation its guardian ends, and nothing happens."""
    was_pending = scene.is_pending()
    yield from (f"still running: {one}" for one in scene.host.leave(_TIME_IS_UP_SECONDS))
    if was_pending:
        yield from _is_back(scene, command)
    yield from scene.litter()


def _is_back(scene: Scene, command: str) -> Iterator[str]:
    wanted = scene.expected(WAY_BACK[command])
    if (seen := scene.seen()) != wanted:
        yield f"taken back, connections end elsewhere: {difference(seen, wanted)}"
    if scene.is_pending():
        yield "taken back, the change still awaits confirmation"
    if complaints := scene.complaints():
        yield f"taken back, `tpctl status` finds {complaints}"

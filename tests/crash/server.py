"""Runs `tpctl` over and over in one place, each time in a fork that already has every module, and interferes.

`python -m tests.crash.server` reads a request a line, as JSON, and writes an answer a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash import notify, points, processes
from tests.hidden import CODE

_PR_SET_CHILD_SUBREAPER = 36
_LONGEST_RUN_SECONDS = 300.0
_LOOK_SECONDS = 0.02
_STUBBORN = -999
_attending: set[int] = set()
"""Processes of this server's own, that answer guardians."""
KILL_CALLER, KILL_ALL, FAIL_ONCE, FAIL_FROM = "kill the caller", "kill all", "fail once", "fail from there"
HANG = "hang"
CONFIRM_WITHIN = "--confirm-within"
"""A command with this leaves a guardian behind."""


class Fault(NamedTuple):
    """What is done at one point."""

    how: str
    at: int
    """Counted from 1 over the whole run."""
    errno: int = 0

    def strikes(self, count: int, what: str) -> bool:
        """Whether it concerns the point of this number."""
        if self.how == FAIL_FROM:
            return count >= self.at and what.partition(" ")[0] in points.FILES
        return count == self.at


@dataclass(slots=True)
class Run:
    """One run of the command, and what is done to it."""

    faults: list[Fault]
    group: int
    forgetting: bool = False
    """Whether what conntrack is told to forget counts; how much that is depends on what it remembers."""
    seen: list[str] = field(default_factory=list)
    """Every point, in order."""
    hit: str | None = None
    """Where the last of the faults struck."""

    def _passes_over(self, what: str) -> bool:
        return not self.forgetting and what.endswith(points.FORGETTING)

    def meet(self, listener: int, call: notify.Call) -> None:
        """Decide about one call."""
        what = points.describe(call)
        if what is None or self._passes_over(what) or processes.is_detached(call.process):
            notify.proceed(listener, call)
            return
        who = "" if call.process == self.group else f" ({processes.name(call.process)})"
        self.seen.append(f"{what}{who}")
        count = len(self.seen)
        if self.faults and count == self.faults[-1].at:
            self.hit = self.seen[-1]
        fault = next((one for one in self.faults if one.strikes(count, what)), None)
        if fault is None:
            notify.proceed(listener, call)
        elif fault.how == KILL_CALLER:
            processes.end([call.process])
        elif fault.how == KILL_ALL:
            # First who would take notice of another one's end; again, for who was started meanwhile.
            processes.end([*processes.detached(), self.group, *processes.attached(_attending)])
            processes.end(processes.attached(_attending))
        elif fault.how != HANG:  # without an answer the call never comes back
            notify.refuse(listener, call, fault.errno)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the command once; hands back its exit code, what it printed, and the points."""
    _attending.intersection_update(processes.children())
    streams = [os.memfd_create(name) for name in ("out", "err")]
    told, telling = os.pipe()
    waiting, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        _command(request, streams, telling, waiting)
    os.close(telling)
    os.close(waiting)
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(child, child)
    listener = notify.fetch(child, int(os.read(told, 16)))
    os.close(told)
    os.close(go)
    this = Run([Fault(*one) for one in request.get("faults", ())], child, request.get("forgetting", False))
    ended = _supervise(listener, this, leaves_somebody=CONFIRM_WITHIN in request["argv"])
    status = _reap(child)
    said = []
    for stream in streams:
        said.append(os.pread(stream, 1 << 20, 0).decode(errors="replace"))
        os.close(stream)
    status = status if ended else _STUBBORN
    return {"exit": status, "out": said[0], "err": said[1], "points": this.seen, "hit": this.hit}


def _command(request: dict[str, Any], streams: list[int], telling: int, waiting: int) -> None:
    """What the fork does; never comes back."""
    status = 70
    try:
        os.setpgid(0, 0)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        listener = notify.watch(points.filter_program())
        os.writev(telling, [str(listener).encode()])  # not write(2), which would wait for the listener
        os.read(waiting, 1)
        os.close(listener)
        from tpctl.cli.main import main
        from tpctl.system import child, runner

        if request.get("patience"):
            runner.run.__kwdefaults__.update(timeout=request["patience"])  # type: ignore[union-attr]
            child.in_child.__kwdefaults__.update(seconds=request["patience"])  # type: ignore[union-attr]
        sys.argv = ["tpctl", *request["argv"]]
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _supervise(listener: int, this: Run, *, leaves_somebody: bool) -> bool:
    """Answer until nobody is left who asks; whether that came by itself. Closes the listener.

    With `leaves_somebody` that ends with the command: whom it leaves behind is answered by a process of its own.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    deadline = time.monotonic() + _LONGEST_RUN_SECONDS
    by_itself = True
    try:
        while True:
            left = max(0.0, deadline - time.monotonic())
            events = poll.poll(1000 * (min(_LOOK_SECONDS, left) if leaves_somebody else left) if by_itself else 2000)
            if not events and leaves_somebody and left and not processes.attached(_attending):
                _attend(listener)
                return by_itself
            if not events and not by_itself:
                return False
            if not events and not left:
                by_itself = False
                processes.end(processes.attached(_attending))
            if not events:
                continue
            (_, event), *_ = events
            if event & select.POLLIN:
                call = notify.receive(listener)
                if call:
                    this.meet(listener, call)
            elif event & select.POLLHUP:
                return by_itself
    finally:
        os.close(listener)


def _attend(listener: int) -> None:
    """Let a process answer whoever is left that everything may happen; without a listener every call would fail."""
    if answers := os.fork():
        _attending.add(answers)
        return
    try:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while poll.poll()[0][1] & select.POLLIN:
            call = notify.receive(listener)
            if call:
                notify.proceed(listener, call)
    finally:
        os._exit(0)


def _reap(child: int) -> int:
    """Wait for the command; take the orphans along that came to this process with its end."""
    _, raw = os.waitpid(child, 0)
    processes.reap()
    return os.waitstatus_to_exitcode(raw)


def listing(roots: list[str]) -> dict[str, str]:
    """Every file below the roots, with its content, and every folder, as this process sees them; without our code."""
    found: dict[str, str] = {}
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if Path(folder, name) not in CODE]
            found[f"{folder}/"] = ""
            for name in files:
                with contextlib.suppress(OSError):
                    found[f"{folder}/{name}"] = Path(folder, name).read_text(errors="replace")
    return found


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if "list" in request:
        return dict(listing(request["list"]))
    if "write" in request:
        path = Path(request["write"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(request["text"])
        return {}
    if "leave" in request:
        return {"left": processes.leave(request["leave"])}
    if "shell" in request:
        done = subprocess.run(["sh", "-ec", request["shell"]], capture_output=True, text=True, check=False)
        return {"exit": done.returncode, "out": done.stdout, "err": done.stderr, "points": [], "hit": None}
    return run(request)


def preload() -> None:
    """Import what any command may import: a fork then begins where a process that did so by itself would be."""
    import tpctl

    for module in pkgutil.walk_packages(tpctl.__path__, "tpctl."):
        importlib.import_module(module.name)
    with contextlib.suppress(Exception):
        from tpctl.engines.iptables import libiptc

        libiptc.load()
    for name in ("nftables", "structlog", "yaml"):
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module(name)


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0), "r")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    preload()
    print("ready", file=answers, flush=True)
    try:
        for line in requests:
            request = json.loads(line)
            answer = _answer(request)
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        processes.leave(0.0)


if __name__ == "__main__":
    main()

"""Starts the relay's workers and sees to it that they all serve, or none."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from agent.relay.dns_local import read_zone
from agent.relay.listen import show
from agent.relay.notify import notify, watchdog_interval
from agent.relay.privileges import raise_descriptor_limit
from agent.relay.settings import Settings
from agent.relay.sockets import Sockets, deal, open_sockets
from agent.relay.tally import Tally
from agent.relay.worker import AT_ONCE, DRAINING_SIGNALS, Worker

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def serve(settings: Settings, log: FilteringBoundLogger) -> int:
    """Run the relay until it is told to end; returns the exit code.

    Raises HostError when a listener cannot be opened, InputError when the DNS zone file is unusable.
    """
    if os.geteuid() == 0:
        log.warning(
            "running as root: unless the policy's data plane user is root, the relay's own connections are captured"
        )
    raise_descriptor_limit()
    opened, _new = open_sockets(settings)
    addresses = {listener.name: show(listener.listen.address) for listener in settings.listeners}
    log.info("listening", workers=settings.workers, **addresses)
    if settings.workers == 1:
        worker = Worker(settings, Tally(1), log)
        worker.use(settings, opened)
        _announce(log)
        worker.run()
        log.info("ended")
        return 0
    return _supervise(settings, opened, Tally(settings.workers), log)


def _announce(log: FilteringBoundLogger) -> None:
    log.info("ready", pid=os.getpid())
    notify("READY=1")


def _supervise(settings: Settings, opened: Sockets, counts: Tally, log: FilteringBoundLogger) -> int:
    read_zone(settings.dns)  # what is wrong with it is said here, and not by each worker
    watched = (*DRAINING_SIGNALS, AT_ONCE, signal.SIGCHLD, signal.SIGALRM)
    # Blocked before the first fork, so that none is lost; sigwait takes them one by one.
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    alive_reader, alive_writer = os.pipe2(os.O_CLOEXEC)
    workers: set[int] = set()
    for number in range(settings.workers):
        pid = os.fork()
        if pid == 0:
            os.close(alive_writer)
            counts.be(number)
            mine = {place: deal(sockets, number, settings.workers) for place, sockets in opened.items()}
            _close_others(opened, mine)
            _work(lambda: Worker(settings, counts, log, alive_reader), settings, mine, log)
        workers.add(pid)
    # Kept open here, the sockets would go on accepting for workers that have ended.
    for sockets in opened.values():
        for sock in sockets:
            sock.close()
    os.close(alive_reader)
    _announce(log)
    try:
        return _watch(workers, watched, log)
    finally:
        os.close(alive_writer)


def _work(make: Callable[[], Worker], settings: Settings, mine: Sockets, log: FilteringBoundLogger) -> NoReturn:
    """The life of a forked worker; never returns into the supervisor's code."""
    code = 1
    try:
        os.environ.pop("NOTIFY_SOCKET", None)
        worker = make()
        worker.use(settings, mine)
        worker.run()
        code = 0
    except Exception:
        log.exception("a worker failed", pid=os.getpid())
    finally:
        os._exit(code)


def _close_others(opened: Sockets, mine: Sockets) -> None:
    for place, sockets in opened.items():
        for sock in sockets:
            if sock not in mine[place]:
                sock.close()


def _watch(workers: set[int], watched: tuple[signal.Signals, ...], log: FilteringBoundLogger) -> int:
    """Pass signals on until the last worker has ended. One that ends unasked takes the others with it."""
    code = 0
    ending = False
    # Not sigtimedwait: after SIGSTOP and SIGCONT, CPython 3.11 hands back a signal that never came.
    if interval := watchdog_interval():
        signal.setitimer(signal.ITIMER_REAL, interval, interval)
    while workers:
        number = signal.sigwait(watched)
        if number == signal.SIGALRM:
            notify("WATCHDOG=1")
            continue
        if number != signal.SIGCHLD:
            notify("STOPPING=1")
            _tell(workers, AT_ONCE if ending else number)
            ending = True
            continue
        for pid, status in _ended(workers):
            workers.discard(pid)
            if status or not ending:
                code = 1
                log.error("a worker has died", pid=pid, status=status)
            if not ending:
                ending = True
                _tell(workers, AT_ONCE)
    log.info("ended", exit_code=code)
    return code


def _tell(workers: set[int], number: int) -> None:
    for pid in workers:
        os.kill(pid, number)


def _ended(workers: set[int]) -> list[tuple[int, int]]:
    """The workers that have ended, each with its exit code (negative: the signal that killed it)."""
    ended = []
    for pid in workers:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended

"""Starts the relay's workers and sees to it that they all serve, or none."""

from __future__ import annotations

import os
import pwd
import signal
from typing import TYPE_CHECKING, NoReturn

from agent.errors import HostError, InputError
from agent.host.users import uid_of
from agent.relay.listeners import Listeners, open_listeners
from agent.relay.notify import notify, watchdog_interval
from agent.relay.settings import Settings
from agent.relay.worker import AT_ONCE, DRAINING_SIGNALS, Worker, raise_descriptor_limit

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def become(user: str) -> None:
    """Run as another user (a name or a uid) from now on.

    Must come before any socket is opened: rules match the user who created a socket, not the one who uses it.
    Raises InputError when there is no such user, HostError when this process may not become that user.
    """
    uid = uid_of(user)
    if uid is None:
        raise InputError(f"--user: there is no user {user!r} on this host")
    if uid == os.geteuid():
        return
    entry = pwd.getpwuid(uid)
    try:
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except PermissionError:
        raise HostError(f"--user {user}: only root may become another user") from None


def serve(settings: Settings, log: FilteringBoundLogger) -> int:
    """Run the relay until it is told to end; returns the exit code.

    Raises HostError when a listener cannot be opened.
    """
    if os.geteuid() == 0:
        log.warning(
            "running as root: unless the policy's data plane user is root, the relay's own connections are captured"
        )
    raise_descriptor_limit()
    opened = open_listeners(settings)
    log.info("listening", address=settings.bind_address, workers=settings.workers, **settings.named_ports)
    if len(opened) == 1:
        _announce(log)
        Worker(settings, opened[0], log).run()
        log.info("ended")
        return 0
    return _supervise(settings, opened, log)


def _announce(log: FilteringBoundLogger) -> None:
    log.info("ready", pid=os.getpid())
    notify("READY=1")


def _supervise(settings: Settings, opened: list[Listeners], log: FilteringBoundLogger) -> int:
    watched = (*DRAINING_SIGNALS, AT_ONCE, signal.SIGCHLD, signal.SIGALRM)
    # Blocked before the first fork, so that none is lost; sigwait takes them one by one.
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    alive_reader, alive_writer = os.pipe2(os.O_CLOEXEC)
    workers: set[int] = set()
    for listeners in opened:
        pid = os.fork()
        if pid == 0:
            os.close(alive_writer)
            _work(settings, listeners, [other for other in opened if other is not listeners], log, alive_reader)
        workers.add(pid)
    # Kept open here, the listeners would go on accepting for workers that have ended.
    for listeners in opened:
        listeners.close()
    os.close(alive_reader)
    _announce(log)
    try:
        return _watch(workers, watched, log)
    finally:
        os.close(alive_writer)


def _work(
    settings: Settings, mine: Listeners, others: list[Listeners], log: FilteringBoundLogger, supervisor: int
) -> NoReturn:
    """The life of a forked worker; never returns into the supervisor's code."""
    code = 1
    try:
        for listeners in others:
            listeners.close()
        os.environ.pop("NOTIFY_SOCKET", None)
        Worker(settings, mine, log, supervisor).run()
        code = 0
    except Exception:
        log.exception("a worker failed", pid=os.getpid())
    finally:
        os._exit(code)


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

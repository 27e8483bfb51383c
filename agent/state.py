"""What is installed in this network namespace, on record; and the lock that keeps two tpctl from working at once.

The record is a convenience: rules identify themselves, and uninstall works without it. It lies under /run/tpctl, keyed
by network namespace because rules are per namespace, and is gone after a reboot as the rules are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import agent
from agent import private_folder, runner
from agent.engine_options import EngineOptions
from agent.errors import ApplyError
from agent.input_files import is_others, read_private
from agent.policy import Policy
from agent.policy_document import from_document, to_document

DIRECTORY = Path("/run/tpctl")
FORMAT = 1
LOCK_WAIT_SECONDS = 30.0
LOCK_POLL_SECONDS = 0.05
SO_NETNS_COOKIE = 71
"""include/uapi/asm-generic/socket.h, since Linux 5.14: a number no other namespace gets until the next boot."""

MAX_SIZE = 64 * 1024 * 1024
"""Bytes of a record that is read."""
RECORDS = ("state.json", "pending.json")

_TEMPORARY = ".state-"
R = TypeVar("R")

INSTALLING = "installing"
INSTALLED = "installed"


@dataclass(frozen=True, slots=True)
class State:
    """The record of an installation."""

    policy: Policy
    phase: str = INSTALLED
    """"installing" from before the first change to the kernel until after the last one."""
    installed_at: str = ""
    """ISO 8601, UTC."""
    version: str = agent.__version__
    """The tpctl that installed it."""
    options: EngineOptions = field(default_factory=EngineOptions)
    """How it was installed; engine and variant are those that were used, not "auto"."""
    footprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By engine: what it needs to know of the host as it was before that engine's first install."""


def namespace_key() -> str:
    """What tells this network namespace from every other one of this boot."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            (cookie,) = struct.unpack("Q", probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))
            return f"netns-{cookie}"
    except OSError:
        return f"netns-inode-{Path('/proc/self/ns/net').stat().st_ino}"


def path() -> Path:
    """The record's place for this network namespace."""
    return DIRECTORY / namespace_key() / "state.json"


def load() -> State | None:
    """The record, or None when there is none that can be read (a damaged one, or another user's, counts as none)."""
    return read(path(), of_document)


def read(file: Path, of: Callable[[dict[str, Any]], R]) -> R | None:
    """A record as `of` makes it of a document; None where it raises something, or the file is not root's own."""
    if not private_folder.is_private(file.parent):
        return None
    try:
        return of(json.loads(read_private(file, MAX_SIZE)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def of_document(document: Mapping[str, Any]) -> State:
    """The record that `document_of` made, by this version or an older one.

    Raises ValueError, LookupError, TypeError, AttributeError or ArithmeticError for anything else.
    What an older version did not write has its default; what a newer one added is passed over.
    """
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']} is not known")
    return State(
        policy=from_document(document["policy"]),
        phase=str(document["phase"]),
        installed_at=str(document["installedAt"]),
        version=str(document["version"]),
        options=_options(document["options"]),
        footprints={str(engine): dict(held) for engine, held in document["footprints"].items()},
    )


def _options(document: Mapping[str, Any]) -> EngineOptions:
    """The options of a document. Raises TypeError when one is of another type."""
    default = EngineOptions()
    given = {one.name: document[one.name] for one in dataclasses.fields(default) if one.name in document}
    for name, value in given.items():
        like = getattr(default, name)
        if not isinstance(value, str | None if like is None else type(like)):
            raise TypeError(f"{name} is {value!r}")
    return EngineOptions(**given)


def document_of(state: State) -> dict[str, Any]:
    """A record as JSON types."""
    return {
        "format": FORMAT,
        "version": state.version,
        "installedAt": state.installed_at or now(),
        "phase": state.phase,
        "options": dataclasses.asdict(state.options),
        "policy": to_document(state.policy),
        "footprints": dict(state.footprints),
    }


def load_policy() -> Policy | None:
    """The installed policy, or None when nothing is on record."""
    found = load()
    return found.policy if found else None


def save(state: State) -> None:
    """Replace the record, whole or not at all. Raises ApplyError when it cannot be written."""
    write(path(), document_of(state))


def write(target: Path, document: Mapping[str, Any]) -> None:
    """Replace a file of records, whole or not at all. Raises ApplyError when it cannot be written."""
    try:
        _written(target.parent, document).replace(target)
    except OSError as error:
        raise _unwritable(target, error) from error


def _written(folder: Path, document: Mapping[str, Any]) -> Path:
    """A temporary file in a folder, which is made if need be. Raises OSError; no file is left then."""
    private_folder.prepare(folder)
    # mkstemp creates the file anew (O_EXCL), so nobody's symlink is followed.
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=_TEMPORARY)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=2)
            stream.write("\n")
            os.fchmod(descriptor, 0o644)
    except OSError:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    return Path(temporary)


def _unwritable(target: Path, error: OSError) -> ApplyError:
    return ApplyError(f"the record {target} cannot be written: {error.strerror}")


@dataclass(frozen=True, slots=True)
class Renewal:
    """A record on its way to another's place. What needs room on the disk has it; only renames are left to do."""

    target: Path
    before: Path | None
    """A second name of the record that was there."""
    after: Path

    def finish(self) -> None:
        """Make the new record the one that counts. Raises ApplyError."""
        try:
            self.after.replace(self.target)
        except OSError as error:
            raise _unwritable(self.target, error) from error
        if self.before:
            with contextlib.suppress(OSError):  # the next command that takes the lock removes it
                self.before.unlink()

    def undo(self) -> None:
        """Bring the old record back. Where even that fails, a record stays that says `installing`."""
        with contextlib.suppress(OSError, ApplyError):
            if self.before:
                self.before.replace(self.target)
                self.after.unlink(missing_ok=True)
            else:
                clear()


def begin(state: State) -> Renewal:
    """Put on record that `state` is being installed. Raises ApplyError; the record is then as it was."""
    target = path()
    before = target.with_name(f"{_TEMPORARY}before") if target.exists() else None
    made: list[Path] = []
    try:
        made.append(_written(target.parent, document_of(dataclasses.replace(state, phase=INSTALLED))))
        made.append(_written(target.parent, document_of(dataclasses.replace(state, phase=INSTALLING))))
        if before:
            before.unlink(missing_ok=True)
            os.link(target, before)
        made[1].replace(target)
    except OSError as error:
        for file in (*made, *((before,) if before else ())):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            target.parent.rmdir()
        raise ApplyError(f"{_unwritable(target, error)}. Nothing was changed") from error
    return Renewal(target, before, made[0])


def clear() -> None:
    """Forget the record, and the folder that held it. Raises ApplyError when it cannot be removed."""
    folder = path().parent
    try:
        (folder / "state.json").unlink(missing_ok=True)
        _clear_temporary(folder)
    except OSError as error:
        raise ApplyError(f"the record {folder / 'state.json'} cannot be removed: {error.strerror}") from error
    with contextlib.suppress(OSError):
        folder.rmdir()


def _clear_temporary(folder: Path) -> None:
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        _discard(leftover)


def _discard(thing: Path) -> None:
    """Remove whatever it is; a symbolic link itself, not what it stands for."""
    if thing.is_dir() and not thing.is_symlink():
        shutil.rmtree(thing)
    else:
        thing.unlink(missing_ok=True)


def _make_right(folder: Path) -> None:
    """Take away what stands in the place of the records and is none of them: a link, a pipe, another user's file."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    private_folder.prepare(folder)
    for record in (folder / name for name in RECORDS):
        with contextlib.suppress(FileNotFoundError):
            found = record.lstat()
            if not stat.S_ISREG(found.st_mode) or is_others(found):
                _discard(record)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the block, out of everybody's reach; should tpctl be killed, the next to take the lock removes it.

    To be called under the lock. Raises OSError.
    """
    parent = path().parent
    private_folder.prepare(parent)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=_TEMPORARY) as folder:
            yield Path(folder)
    finally:
        with contextlib.suppress(OSError):
            parent.rmdir()  # only goes when there is no record


def now() -> str:
    """The time, as the record keeps it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def locked(*, wait: float = LOCK_WAIT_SECONDS) -> Iterator[None]:
    """Let only one tpctl change this namespace at a time.

    The lock goes with the process that holds it. Raises ApplyError, naming the holder, when it is not free within
    `wait` seconds.
    """
    place = DIRECTORY / f"{namespace_key()}.lock"
    try:
        descriptor = _acquire(place, wait)
    except OSError as error:
        raise ApplyError(f"the lock {place} cannot be taken: {error.strerror}. Nothing was changed") from error
    runner.INHERITED.add(descriptor)  # a program that outlives a killed tpctl still changes the rules
    try:
        with contextlib.suppress(OSError):  # who holds it is good to know, no more
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        with contextlib.suppress(OSError):
            _make_right(path().parent)
            _clear_temporary(path().parent)  # a tpctl that was killed left them
        with _undisturbed():
            yield
    finally:
        runner.INHERITED.discard(descriptor)
        with contextlib.suppress(OSError):
            if not path().exists():
                place.unlink(missing_ok=True)
                DIRECTORY.rmdir()
        os.close(descriptor)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let a lost terminal or Ctrl-C wait until the change is complete or rolled back; programs started inherit it.

    Ctrl-C has nothing left to stop then, so it is dropped: the command goes on to tell how the change ended.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        if signal.SIGINT not in before:
            signal.sigtimedwait({signal.SIGINT}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _acquire(place: Path, wait: float) -> int:
    """A descriptor that holds the lock."""
    deadline = time.monotonic() + wait
    while True:
        try:
            private_folder.prepare(DIRECTORY)
            descriptor = _opened(place)
        except FileNotFoundError:
            continue  # an uninstall has just removed the directory
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(place, descriptor):
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise ApplyError(_held(place, holder, wait)) from None
            time.sleep(LOCK_POLL_SECONDS)
        os.close(descriptor)


def _opened(place: Path) -> int:
    """The lock file, which nobody else can open: whoever could would be able to hold the lock for ever."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            found = place.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                _discard(place)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(descriptor).st_nlink <= 1:
            return descriptor
        os.close(descriptor)  # a file that has another name is not ours to write to
        _discard(place)


def _held(place: Path, holder: str, wait: float) -> str:
    who = f"another tpctl (process {holder}) has"
    if holder.isdecimal() and not Path("/proc", holder).exists():
        who = f"a program that tpctl (process {holder}, which has ended) had started runs on, and has"
    return f"{who} held {place} for {wait:g} s; nothing was changed"


def _is_still(place: Path, descriptor: int) -> bool:
    """Whether the locked file is the one others will open: an uninstall removes it while it holds the lock."""
    try:
        return os.path.samestat(place.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False

"""What is installed in this network namespace, on record; and the lock that keeps two tpctl from working at once.

The record is a convenience: rules identify themselves, and uninstall works without it. It lies under /run/tpctl, keyed
by network namespace because rules are per namespace, and is gone after a reboot as the rules are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tpctl
from tpctl.record import life, lock
from tpctl.spec.document import from_document, to_document
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Policy
from tpctl.system import private_folder, runner
from tpctl.system.errors import ApplyError
from tpctl.system.input_files import is_others, read_private

DIRECTORY = Path("/run/tpctl")
FORMAT = 1
LOCK_WAIT_SECONDS = 30.0

MAX_SIZE = 64 * 1024 * 1024
"""Bytes of a record that is read."""
RECORDS = ("state.json", "pending.json")

_TEMPORARY = ".state-"
_LOCK = ".lock"
TRACE = ".taken-back"
"""What `tpctl.record.taken_back` keeps of a namespace."""
MARK = "namespace"
"""The key of a record under which stands what `tpctl.record.life` knows its namespace by."""
R = TypeVar("R")


class ReadOnlyError(ApplyError):
    """A record that stays because its file system is read-only."""


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
    version: str = tpctl.__version__
    """The tpctl that installed it."""
    options: EngineOptions = field(default_factory=EngineOptions)
    """How it was installed; engine and variant are those that were used, not "auto"."""
    footprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By engine: what it needs to know of the host as it was before that engine's first install."""
    inputs: Mapping[str, Any] | None = None
    """The configuration that the policy was made of (`tpctl.config.inputs`); None in records of older versions."""


def namespace_key() -> str:
    """What tells this network namespace from every other one that lives."""
    return life.key()


def path() -> Path:
    """The record's place for this network namespace."""
    return DIRECTORY / namespace_key() / "state.json"


def load() -> State | None:
    """The record, or None when there is none that can be read (a damaged one, or another user's, counts as none)."""
    return read(path(), of_document)


def read(file: Path, of: Callable[[dict[str, Any]], R]) -> R | None:
    """A record as `of` makes it of a document.

    None where it raises something, where the file is not root's own, and where it is of a namespace that has gone.
    """
    if not _is_private(file.parent):
        return None
    try:
        document = json.loads(read_private(file, MAX_SIZE))
        return of(document) if life.belongs(document.get(MARK)) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def _is_private(folder: Path) -> bool:
    """Whether nobody but root could have put anything into a folder of records."""
    return private_folder.is_private(folder.parent) and private_folder.is_private(folder)


def of_document(document: Mapping[str, Any]) -> State:
    """The record that `document_of` made, by this version or an older one.

    Raises ValueError, LookupError, TypeError, AttributeError or ArithmeticError for anything else.
    What an older version did not write has its default; what a newer one added is passed over.
    """
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']} is not known")
    options = _options(document["options"])
    return State(
        policy=from_document(document["policy"]).through(options.engine),
        phase=str(document["phase"]),
        installed_at=str(document["installedAt"]),
        version=str(document["version"]),
        options=options,
        footprints={str(engine): dict(held) for engine, held in document["footprints"].items()},
        inputs=None if document.get("inputs") is None else dict(document["inputs"]),
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
        **({} if state.inputs is None else {"inputs": dict(state.inputs)}),
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
        _written(target.parent, document, life.mark()).replace(target)
    except OSError as error:
        raise _unwritable(target, error) from error


def _written(folder: Path, document: Mapping[str, Any], mark: Mapping[str, Any]) -> Path:
    """A temporary file in a folder, which is made if need be. Raises OSError; no file is left then."""
    private_folder.prepare(folder)
    descriptor, temporary = private_folder.new_file(folder, _TEMPORARY)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump({**document, MARK: mark}, stream, indent=2)
            stream.write("\n")
            os.fchmod(descriptor, 0o644)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _unwritable(target: Path, error: OSError) -> ApplyError:
    return ApplyError(f"the record {target} cannot be written: {error.strerror}")


class Renewal(NamedTuple):
    """A record on its way to another's place. What needs room on the disk has it; only renames are left to do."""

    target: Path
    before: Path | None
    """A second name of the record that was there."""
    after: Path | None
    """None where no record can be written: then nothing happens."""

    def finish(self) -> None:
        """Make the new record the one that counts. Raises ApplyError."""
        if self.after is None:
            return
        try:
            self.after.replace(self.target)
        except OSError as error:
            raise _unwritable(self.target, error) from error
        if self.before:
            with contextlib.suppress(OSError):  # the next command that takes the lock removes it
                self.before.unlink()

    def undo(self) -> None:
        """Bring the old record back. Where even that fails, a record stays that says `installing`."""
        if self.after is None:
            return
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
        mark = life.mark()
        for phase in (INSTALLED, INSTALLING):
            made.append(_written(target.parent, {**document_of(state), "phase": phase}, mark))
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
    if not _is_private(folder):
        return  # it is not there, or was not believed and is not ours to remove
    try:
        if os.path.lexists(folder / "state.json"):  # a read-only disk refuses to remove what is not there, too
            (folder / "state.json").unlink(missing_ok=True)
        _clear_temporary(folder)
    except OSError as error:
        said = f"the record {folder / 'state.json'} cannot be removed: {error.strerror}"
        raise (ReadOnlyError if error.errno == errno.EROFS else ApplyError)(said) from error
    with contextlib.suppress(OSError):
        folder.rmdir()


def _clear_temporary(folder: Path) -> None:
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        lock.discard(leftover)


def _make_right(folder: Path) -> None:
    """Take away what stands in the place of the records and is none of them: a link, a pipe, another user's file."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    private_folder.prepare(folder)
    for record in (folder / name for name in RECORDS):
        with contextlib.suppress(FileNotFoundError):
            found = record.lstat()
            if not stat.S_ISREG(found.st_mode) or is_others(found) or not life.belongs(_mark_of(record)):
                lock.discard(record)


def _mark_of(record: Path) -> object:
    """What a record says of its namespace; None when it cannot be read."""
    try:
        return json.loads(read_private(record, MAX_SIZE)).get(MARK)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _tidy() -> None:
    """Remove records and locks of namespaces that have gone, under their own locks; those held are left alone."""
    own = namespace_key()
    for trace in DIRECTORY.glob(f"netns-*{TRACE}"):
        if life.is_dead(_mark_of(trace)):
            lock.discard(trace)
    names = {found.name for found in DIRECTORY.glob("netns-*")}
    keys = {name.removesuffix(_LOCK) for name in names if not name.endswith(TRACE)} - {own}
    for key in keys:
        folder, place = DIRECTORY / key, DIRECTORY / f"{key}{_LOCK}"
        if not _is_left(folder):
            continue
        with contextlib.suppress(OSError, ApplyError):
            descriptor = lock.acquire(place, 0.0)
            try:
                if _is_left(folder):
                    for name in RECORDS:
                        (folder / name).unlink(missing_ok=True)
                    if folder.is_dir():
                        _clear_temporary(folder)
                        folder.rmdir()
                    place.unlink()
            finally:
                os.close(descriptor)


def _is_left(folder: Path) -> bool:
    """Whether the records in a folder are those of a namespace that has gone, or there is no folder at all.

    A lock without a folder is nobody's: who holds it is left alone, and who wants it makes it again.
    """
    if not folder.exists():
        return True
    if not private_folder.is_private(folder):
        return False
    marks = [_mark_of(folder / name) for name in RECORDS if (folder / name).exists()]
    return bool(marks) and all(life.is_dead(mark) for mark in marks)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the block, out of everybody's reach; should tpctl be killed, the next to take the lock removes it.

    To be called under the lock. Raises OSError.
    """
    import tempfile

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
def locked(*, wait: float = LOCK_WAIT_SECONDS, is_way_out: bool = False) -> Iterator[str | None]:
    """Let only one tpctl change this namespace at a time, for the length of the block.

    The lock goes with the process that holds it. Raises ApplyError, naming the holder, when it is not free within
    `wait` seconds, or when it cannot be made. A full or read-only disk must not bar the way out, however: `is_way_out`
    goes on without, and the block is given the reason. A lock that is there is taken all the same.
    """
    place = DIRECTORY / f"{namespace_key()}{_LOCK}"
    why = None
    descriptor: int | None
    try:
        descriptor = lock.acquire(place, wait)
    except OSError as error:
        why = f"the lock {place} cannot be taken: {error.strerror}"
        if not is_way_out:
            raise ApplyError(f"{why}. Nothing was changed") from error
        descriptor = lock.acquire_existing(place, wait)
    if descriptor is None:
        with lock.undisturbed():
            yield why
        return
    runner.INHERITED.add(descriptor)  # a program that outlives a killed tpctl still changes the rules
    try:
        with contextlib.suppress(OSError):  # who holds it is good to know, no more
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        with contextlib.suppress(OSError):
            _make_right(path().parent)
            _clear_temporary(path().parent)  # a tpctl that was killed left them
            _tidy()
        with lock.undisturbed():
            yield None
    finally:
        runner.INHERITED.discard(descriptor)
        with contextlib.suppress(OSError):
            if not path().exists():
                place.unlink(missing_ok=True)
                DIRECTORY.rmdir()
        os.close(descriptor)

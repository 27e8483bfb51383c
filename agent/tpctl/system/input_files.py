"""Files that tpctl is told to read or run: opened once, judged by the open descriptor, and read up to a limit.

Who may write a configuration decides what root does. So root takes one only from a file that nobody else may change:
it, every directory and every symbolic link on the way to it belong to root, and others may not write to them. A sticky
directory such as /tmp is good enough, for in it others cannot replace what is root's. Each step is opened from the one
before, as the kernel would go, and judged by its descriptor; nothing is looked up twice. Programs are judged likewise.

A FIFO, a device or a socket is no file, by whatever name: to open a FIFO may wait for ever, and to open a device may do
something. What the caller has opened itself, standard input and /dev/fd/N, is taken as it is; that is what a shell
makes of `--config <(command)`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shlex
import stat
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

STDIN = "-"
MAX_CONFIGURATION = 1024 * 1024
"""Bytes; a policy with 10 000 networks has a quarter of that."""

_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,9})|/dev/(stdin)")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
"""Without waiting: opening a FIFO that nobody writes to would not return."""
_MAX_LINKS = 40
"""MAXSYMLINKS in include/linux/namei.h."""
_CHUNK = 1 << 16


class UnusableFileError(Exception):
    """A file that cannot be read or parsed; says why."""


class _Rule(NamedTuple):
    """Who alone may have to do with a file, and what is said when others may."""

    why: str
    otherwise: str = ""
    """Another way out."""
    owners: frozenset[int] = frozenset({0})
    """To whom the file, and every directory and link on the way to it, may belong."""
    group: str | None = None
    """For a private key or a secret, which others may not read either: the group that it should belong to."""
    does: str = "reads"
    """What root does with it."""


_CONFIGURATION = _Rule(
    "root takes its configuration only from a file that nobody else may change",
    " (or pass the content on standard input, as -)",
)
_TRUSTED = "it is trusted, so nobody else may change it"
_PROGRAM = _Rule("root runs only programs that nobody else may change", does="runs")
_SECRET = "it is secret, so nobody else may change it, and at most a group may read it"  # noqa: S105 - no password


def read_configuration(path: str) -> str:
    """The text of a configuration file; `-` is stdin. Raises UnusableFileError.

    For root it must be root's, as described above.
    """
    return _text(path, MAX_CONFIGURATION, trusted=os.geteuid() == 0)


def read_text(path: str | Path, limit: int) -> str:
    """The text of any other file of at most `limit` bytes. Raises UnusableFileError."""
    return _text(str(path), limit, trusted=False)


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The bytes of such a file. Raises OSError, and UnusableFileError when it is larger."""
    return _content(str(path), limit, trusted=False)


def judge(path: str | Path, user: int = 0, key_for: str | None = None) -> None:
    """Raise UnusableFileError if anybody but root and `user`, for whom it is, may change a file, or which one it is.

    `key_for` is for private keys and secrets, which others may not read either, and names the group that should be able
    to. What is missing, or cannot be opened, is not judged, and what the caller has opened himself is as he wants it.
    """
    rule = _Rule(_SECRET if key_for else _TRUSTED, owners=frozenset({0, user}), group=key_for)
    if _DESCRIPTOR.fullmatch(str(path)):
        return
    with contextlib.suppress(OSError, ValueError):
        os.close(_opened_by(rule, str(path)))


def judge_program(path: str) -> None:
    """Raise UnusableFileError unless a path is that of a program and, for root, nobody else may change which it is."""
    try:
        if os.geteuid() == 0:
            os.close(_opened_by(_PROGRAM, path))
        _require_file(Path(path).stat())
    except (OSError, ValueError) as error:
        raise UnusableFileError(f"cannot be run: {getattr(error, 'strerror', None) or error}") from None
    if not os.access(path, os.X_OK):
        raise UnusableFileError("is no executable file")


def require_file(path: Path) -> None:
    """Raise OSError unless a path is that of a file that can be read, for libraries that open it themselves."""
    os.close(_opened_anyhow(str(path)))


def read_private(path: Path, limit: int) -> bytes:
    """The bytes of a file of root's own. Raises OSError when there is none, or others have anything to do with it."""
    descriptor = os.open(path, _READ | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or is_others(found) or found.st_size > limit:
            raise PermissionError(errno.EPERM, "it is not a file that only root may write", str(path))
        return _read(descriptor, limit)
    finally:
        os.close(descriptor)


def is_others(found: os.stat_result) -> bool:
    """Whether anybody but root and this user may change a file, or the entries of a directory."""
    return found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & _OTHERS_WRITE)


def _text(path: str, limit: int, *, trusted: bool) -> str:
    try:
        content = _content(path, limit, trusted=trusted)
    except OSError as error:
        raise UnusableFileError(f"cannot be read: {error.strerror or error}") from error
    except ValueError:  # os.open refuses such a name itself
        raise UnusableFileError("cannot be read: its name has a zero byte") from None
    if b"\0" in content:
        raise UnusableFileError(f"is not text (byte {content.index(0)} is zero)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableFileError(f"is not UTF-8 text (byte {error.start})") from None


def _content(path: str, limit: int, *, trusted: bool) -> bytes:
    if path == STDIN:
        if sys.stdin is None:
            raise OSError(errno.EBADF, "standard input is closed")
        content = sys.stdin.buffer.read(limit + 1)
        return content if len(content) <= limit else _too_large(limit)
    descriptor = _opened(path, trusted=trusted)
    try:
        return _read(descriptor, limit)
    finally:
        os.close(descriptor)


def _opened(path: str, *, trusted: bool) -> int:
    if own := _DESCRIPTOR.fullmatch(path):
        return os.dup(int(own[1] or 0))
    return _opened_by(_CONFIGURATION, path) if trusted else _opened_anyhow(path)


def _opened_anyhow(path: str) -> int:
    _require_file(os.stat(path))  # noqa: PTH116 - of a path as it was given
    return _checked(os.open(path, _READ))


def _checked(descriptor: int) -> int:
    """The descriptor of a file; closes that of anything else."""
    try:
        _require_file(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_file(found: os.stat_result) -> None:
    mode = found.st_mode
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise OSError(errno.EINVAL, f"it is {kind}, not a file")


def _read(descriptor: int, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size <= limit:
        try:
            part = os.read(descriptor, min(_CHUNK, limit + 1 - size))
        except BlockingIOError:  # a pipe whose writer takes its time
            select.select([descriptor], [], [])
            continue
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    return _too_large(limit)


def _too_large(limit: int) -> NoReturn:
    raise UnusableFileError(f"is larger than {limit} bytes")


def _opened_by(rule: _Rule, path: str) -> int:
    """Go to a file as the kernel would, judging every step. Raises OSError and UnusableFileError."""
    shown = [] if path.startswith("/") else Path.cwd().parts[1:]
    walk = _Walk(rule, path, [*shown])
    try:
        return walk.to_the_end()
    finally:
        os.close(walk.here)


class _Walk:
    """Where a path has led so far."""

    def __init__(self, rule: _Rule, path: str, place: list[str]) -> None:
        self.rule = rule
        self.path = path
        self.here = os.open("/" if path.startswith("/") else ".", _STEP | os.O_DIRECTORY)
        self.place = place
        """The names down to this directory, for messages."""
        self.left = _names(path)
        self.links = 0

    def to_the_end(self) -> int:
        """A descriptor to read the file from."""
        while self.left:
            self._judge_directory()
            name = self.left.pop()
            step = os.open(name, _STEP, dir_fd=self.here)
            try:
                found = os.fstat(step)
                if stat.S_ISLNK(found.st_mode):
                    self._follow(step, name, found)
                elif self.left or stat.S_ISDIR(found.st_mode):
                    self._enter(step, name)
                else:
                    return self._file(name, found)
            finally:
                os.close(step)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    def _enter(self, step: int, name: str) -> None:
        entered = os.open(".", _STEP | os.O_DIRECTORY, dir_fd=step)
        os.close(self.here)
        self.here = entered
        if name == "..":
            del self.place[-1:]
        else:
            self.place.append(name)

    def _follow(self, step: int, name: str, found: os.stat_result) -> None:
        self.links += 1
        if self.links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        link = self._show(name)
        if found.st_uid not in self.rule.owners:
            raise UnusableFileError(
                f"is reached by the symbolic link {link}, which belongs to uid {found.st_uid}, so that user decides "
                f"what root {self.rule.does}: chown --no-dereference root:root {shlex.quote(link)}"
            )
        target = os.readlink("", dir_fd=step)
        self.left += _names(target)
        if target.startswith("/"):
            os.close(self.here)
            self.here = os.open("/", _STEP | os.O_DIRECTORY)
            self.place = []

    def _file(self, name: str, before: os.stat_result) -> int:
        _require_file(before)
        descriptor = _checked(os.open(name, _READ | os.O_NOFOLLOW, dir_fd=self.here))
        found = os.fstat(descriptor)
        forbidden = _OTHERS_WRITE | (stat.S_IROTH if self.rule.group is not None else 0)
        if found.st_uid in self.rule.owners and not found.st_mode & forbidden:
            return descriptor
        os.close(descriptor)
        place = shlex.quote(self._show(name))
        as_key = f"chown root:{self.rule.group} {place} && chmod 0640 {place}"
        remedy = as_key if self.rule.group is not None else _remedy(found, self._show(name))
        raise UnusableFileError(f"{_described(found)}, and {self.rule.why}: {remedy}{self.rule.otherwise}")

    def _judge_directory(self) -> None:
        found = os.fstat(self.here)
        shared = found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX
        if found.st_uid in self.rule.owners and not shared:
            return
        place = self._show()
        raise UnusableFileError(
            f"lies below {place}, which {_described(found)}, so others can replace it: keep it in a directory of "
            f"root's, such as /etc/tpctl, or {_remedy(found, place)}{self.rule.otherwise}"
        )

    def _show(self, name: str = "") -> str:
        return "/" + "/".join([*self.place, *([name] if name else [])])


def _names(path: str) -> list[str]:
    """The steps of a path, the first one last."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _described(found: os.stat_result) -> str:
    return f"belongs to uid {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):04o}"


def _remedy(found: os.stat_result, place: str) -> str:
    """The commands that make a file or directory root's own."""
    commands = [
        *([f"chown root:root {shlex.quote(place)}"] if found.st_uid else []),
        *([f"chmod go-w {shlex.quote(place)}"] if found.st_mode & _OTHERS_WRITE else []),
    ]
    return " && ".join(commands)

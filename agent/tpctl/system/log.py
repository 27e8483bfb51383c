"""Logs of the long-running parts: for people on a terminal, one JSON object a line elsewhere. They go to stderr.

Nobody waits for the log, and nothing fails because of it: see `tpctl.system.log_writer`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from tpctl.system.log_writer import LogWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from structlog.typing import FilteringBoundLogger, Processor

FORMATS = ("auto", "text", "json")
_STDERR = 2
_DROPPED = "log lines were dropped: nobody read them, or they could not be written"
_writer: LogWriter | None = None


def configure(log_format: str, *, debug: bool = False, colours: bool | None = None) -> None:
    """Decide how log lines look: "text", "json", or "auto", which is text when stderr is a terminal.

    `debug` logs what only helps to find a defect, with tracebacks; `colours` is None where a terminal has them and
    nothing else does. Raises ValueError for any other format.
    """
    global _writer
    if log_format not in FORMATS:
        raise ValueError(f"{log_format!r} is not one of {', '.join(FORMATS)}")
    import logging  # here: 70 ms that only long-running commands should pay

    with _postponed("asyncio"):  # for those who log asynchronously: 0.7 MB of a relay with two workers
        import structlog

    terminal = os.isatty(_STDERR)
    text = log_format == "text" or (log_format == "auto" and terminal)
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=terminal if colours is None else colours)
        if text
        else structlog.processors.JSONRenderer()
    )
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        renderer,
    ]
    _writer = writer = LogWriter(_STDERR, lambda lines: _rendered(processors, _DROPPED, lines=lines))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=cast(Any, writer)),
        cache_logger_on_first_use=False,
    )
    _catch_stray_errors()


class _Postponed(ModuleType):
    """Stands for a module that is not loaded until something of it is used."""

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def _postponed(name: str) -> Iterator[None]:
    """Whoever imports the module within the block gets it when something of it is used."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = stand_in = _Postponed(name)
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def get_logger() -> FilteringBoundLogger:
    """A logger; `configure` should have been called."""
    import structlog

    return cast("FilteringBoundLogger", structlog.get_logger())


def write_through(lines: str) -> None:
    """Log whole lines that another program has made, as they are."""
    if _writer is not None:
        _writer.write(lines)


def dropped() -> int:
    """How many lines this process has dropped, because they could not be written, or not soon enough."""
    return _writer.dropped if _writer is not None else 0


def finish() -> None:
    """Wait until what was logged is written, but no longer than a second. To be called before the process ends."""
    if _writer is not None:
        _writer.finish()


def _rendered(processors: Sequence[Processor], event: str, **fields: object) -> str:
    """A warning as a line of the log."""
    made: Any = {"event": event, **fields}
    for process in processors:
        made = process(None, "warning", made)
    return f"{made}\n"


def _catch_stray_errors() -> None:
    """Log what Python would print: an exception that ends a thread or that nobody can catch, and warnings."""

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            _stray("a thread has failed", args.exc_value)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if args.exc_value is not None:
            _stray("an unhandled error", args.exc_value)

    def warned(message: Warning | str, category: type[Warning], *_where: Any) -> None:
        get_logger().warning(str(message), category=category.__name__)

    warnings.showwarning = cast(Any, warned)
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable


def _stray(event: str, error: BaseException) -> None:
    log = get_logger()
    log.error(event, error=f"{type(error).__name__}: {error}")
    log.debug(event, exc_info=error)

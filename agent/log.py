"""Logs of the long-running parts: for people on a terminal, one JSON object a line elsewhere. They go to stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor

FORMATS = ("auto", "text", "json")


def configure(log_format: str) -> None:
    """Decide how log lines look: "text", "json", or "auto", which is text when stderr is a terminal.

    Raises ValueError for any other format.
    """
    if log_format not in FORMATS:
        raise ValueError(f"{log_format!r} is none of {', '.join(FORMATS)}")
    import structlog  # here: 70 ms that only long-running commands should pay

    terminal = sys.stderr.isatty()
    text = log_format == "text" or (log_format == "auto" and terminal)
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=terminal) if text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger() -> FilteringBoundLogger:
    """A logger; `configure` should have been called."""
    import structlog

    return cast("FilteringBoundLogger", structlog.get_logger())

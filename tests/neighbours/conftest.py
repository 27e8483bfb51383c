"""After a run: what was seen beside each neighbour, a line for each test."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print it."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "seen":
                terminalreporter.write_line(f"{report.nodeid.partition('[')[2].rstrip(']')}: {value}")

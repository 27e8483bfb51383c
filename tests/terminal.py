"""A command on a terminal of its own."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Mapping, Sequence

PATIENCE_SECONDS = 60


def on_terminal(argv: Sequence[str], variables: Mapping[str, str], *, typed: str = "", exit_code: int = 0) -> str:
    """What a command writes to its terminal, with what is typed there; it must end with the exit code."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, **variables}
    with subprocess.Popen(list(argv), stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        said = b""
        try:
            while piece := os.read(ours, 65536):
                said += piece
        except OSError:  # EIO: the other end has gone
            pass
        found = process.wait(PATIENCE_SECONDS)
    os.close(ours)
    assert found == exit_code, said.decode()
    return said.decode()

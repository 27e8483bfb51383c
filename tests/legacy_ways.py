"""Hosts with python-iptables and without it, for this process and for the commands that it starts."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from tpctl.engines.iptables import libiptc


@contextmanager
def iptc_that_says(module: str) -> Iterator[None]:
    """Commands that are started import this text as python-iptables."""
    with tempfile.TemporaryDirectory(prefix="tpctl-iptc-") as folder:
        Path(folder, "iptc.py").write_text(module)
        found = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        with mock.patch.dict(os.environ, {"PYTHONPATH": found}):
            yield


@contextmanager
def without_python_iptables() -> Iterator[None]:
    """As on a host that does not have it."""
    libiptc.forget_outcomes()
    hidden = mock.patch.dict(sys.modules, {"iptc": None})
    with iptc_that_says('raise ModuleNotFoundError("No module named iptc")'), hidden:
        yield
    libiptc.forget_outcomes()

"""Libraries that look around: kept from the working directory and the environment of whoever called."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tpctl.system.runner import ENVIRONMENT


@contextmanager
def in_root() -> Iterator[None]:
    """Work in /, where only root can put a file, for the length of the block."""
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    os.chdir("/")
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


@contextmanager
def secluded(variables: Mapping[str, str]) -> Iterator[None]:
    """Work in /, with the environment that programs get and these variables, for the length of the block."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({**ENVIRONMENT, **variables})
    try:
        with in_root():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)

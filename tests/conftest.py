"""What every test shares."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import nullcontext

import hypothesis
import pytest

from tests import features, isolation
from tests.extent import IS_WHOLE
from tests.legacy_ways import without_python_iptables

# How long an example takes, or its generation, says more about what else the machine does than about the code. And a
# commit is judged by the same examples whenever it is; `make test-all` looks for others.
hypothesis.settings.register_profile(
    "tpctl", deadline=None, derandomize=not IS_WHOLE, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tpctl")

# Root takes configurations only from files that nobody else may change, and tests write many.
os.umask(0o022)

_LONGEST = ("vm", "crash", "equivalence", "swap", "torture", "soak")
"""Folders."""

with contextlib.suppress(PermissionError):  # without the right to it, nothing is tested that needs it
    isolation.own_run()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-userspace` asks for."""
    parser.addoption("--without-python-iptables", action="store_true", help="as on a host that does not have it")


@pytest.fixture(scope="session", autouse=True)
def _python_iptables(request: pytest.FixtureRequest) -> Iterator[None]:
    with without_python_iptables() if request.config.getoption("--without-python-iptables") else nullcontext():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first: several files run at a time, and no long one shall be what is left at the end."""
    items.sort(
        key=lambda item: next((at for at, name in enumerate(_LONGEST) if name in item.path.parts), len(_LONGEST))
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine's kernel refuses."""
    features.skip_without(item)


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    """One that opens connections as fast as it can would slow down all that follow a test that failed."""
    before = set(multiprocessing.active_children())
    yield
    for child in set(multiprocessing.active_children()) - before:
        child.kill()
        child.join()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Note how the whole run ended, for whoever tries the failed ones again (.ci/again.py)."""
    cache = getattr(session.config, "cache", None)
    if cache is not None and not hasattr(session.config, "workerinput"):
        cache.set("tpctl/ended", int(exitstatus))

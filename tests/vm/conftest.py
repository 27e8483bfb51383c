"""A machine for each release that VM_RELEASES lists (`make test-vm`: all), or one of bookworm (`make test-all`).

With VM_PROVIDER=vagrant, Vagrant runs them (docs/vagrant.md).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.extent import IS_WHOLE
from tests.vm import evidence
from tests.vm.images import Recipe, image
from tests.vm.machine import Machine
from tests.vm.vagrant import VagrantMachine
from tests.vm.wheel import wheel

RELEASES = os.environ.get("VM_RELEASES", "bookworm").split()
PROVIDER = os.environ.get("VM_PROVIDER", "qemu")
in_the_matrix = pytest.mark.skipif("VM_RELEASES" not in os.environ, reason="takes long: part of make test-vm")
SERVICE_PORT = 8080
"""A port of the machine that is reached from here."""
FRESH = "fresh"
_NEEDED = ("qemu-system-x86_64", "mmdebstrap", "ssh")


def _obstacle() -> str:
    """Why no machine can be had here; nothing when one can."""
    if not IS_WHOLE and "VM_RELEASES" not in os.environ:
        return "takes long: part of make test-all and make test-vm"
    if os.geteuid():
        return "needs root: disk images are built"
    missing = [program for program in _NEEDED if not shutil.which(program)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    distribution = platform.freedesktop_os_release()["ID"]
    return "" if distribution == "debian" else f"needs a mirror of Debian in apt's sources, and this is {distribution}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is not asked for, or cannot be had: root builds images, and qemu boots them."""
    if obstacle := _obstacle():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=obstacle))
    if PROVIDER == "vagrant":
        for item in items:
            if hasattr(getattr(item, "module", None), "SERVICE_PORT"):
                item.add_marker(pytest.mark.skip(reason="reaches the machine through qemu's user network"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """While the machine still is as the failed test left it, it is asked why."""
    report = yield
    machine = next((one for one in getattr(item, "funcargs", {}).values() if isinstance(one, Machine)), None)
    if report.failed and call.when != "teardown" and machine:
        name = re.sub(r"\W+", "-", item.name)
        report.sections.append(("the machine", evidence.keep(machine, name)))
    return report


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as it would be released."""
    return wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session", params=RELEASES)
def running(
    request: pytest.FixtureRequest, package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A machine with tpctl installed, and nothing else changed."""
    release = str(request.param)
    with equipped(Recipe(release), package, tmp_path_factory.mktemp(release)) as made:
        yield made


@contextlib.contextmanager
def equipped(recipe: Recipe, package: Path, folder: Path, *, ports: tuple[int, ...] = ()) -> Iterator[Machine]:
    """A machine of an image, with tpctl installed; its `FRESH` state. `ports` are reached from here as well."""
    with _machine(recipe, folder, (SERVICE_PORT, *ports)) as made:
        made.copy(package, f"/root/{package.name}")
        made.copy(Path(__file__).with_name("probing.py"), "/root/probing.py")
        made.run(f"/opt/tpctl/bin/python -m pip install --quiet --no-index --no-deps /root/{package.name}")
        made.run("tpctl --version")  # its modules are compiled
        made.keep(FRESH)
        yield made


def _machine(recipe: Recipe, folder: Path, ports: tuple[int, ...]) -> Machine:
    if PROVIDER == "vagrant":
        return VagrantMachine(recipe.release, folder)
    try:
        built = image(recipe)
    except RuntimeError as failed:
        if "VM_RELEASES" in os.environ:
            raise
        pytest.skip(f"no image can be built here (make test-vm shows why): {str(failed).strip().splitlines()[-1]}")
    return Machine(built, folder, ports=ports)


@pytest.fixture
def machine(running: Machine) -> Machine:
    """The same machine for every test, as it was when tpctl had just been installed."""
    running.go_back(FRESH)
    return running

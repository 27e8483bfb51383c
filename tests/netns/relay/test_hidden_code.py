"""A relay whose user may not look into the folder of the code, as after a `git clone` in /root."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.relay import dns_net
from tests.netns.relay import net as relay_net
from tests.netns.relay.dns_net import dig
from tests.netns.relay.net import Net
from tests.netns.relay.test_operation import rewrite

pytestmark = pytest.mark.root
LISTENERS = """
listeners:
  - {listen: "*:15001", direction: outbound}
  - {listen: "*:15053", direction: dns}
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with dns_net.network() as made:
        yield made


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """The package where only root can read it."""
    folder = tmp_path / "code"
    folder.mkdir(mode=0o700)
    package = ROOT_DIRECTORY / "agent/tpctl"
    shutil.copytree(package, folder / "tpctl", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_reload_needs_code_that_the_start_did_not(net: Net, directory: Path, code: Path) -> None:
    (directory / "zone.yaml").write_text("names: {db.mesh: 240.0.0.1}\n")
    path = directory / "relay.yaml"
    path.write_text(LISTENERS)
    options = ("--config", str(path))
    with relay_net.relay(net, directory, *options, prefix=("env", f"PYTHONPATH={code}")) as running:
        rewrite(running, directory, f"{LISTENERS}dns: {{zone_file: {directory}/zone.yaml}}\n")
        # It is read beside the work of the relay: until then, nobody is told anything of its names.
        end = time.monotonic() + relay_net.PATIENCE
        while not (said := dig(net, "+short", "db.mesh").split()) and time.monotonic() < end:
            time.sleep(0.05)
        assert said == ["240.0.0.1"], running.lines()

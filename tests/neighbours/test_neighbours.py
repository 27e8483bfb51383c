"""Beside each neighbour, whoever comes first: every redirected connection arrives, or its rule is named.

`make test` runs a slice, `make test-neighbours` everything.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.extent import IS_WHOLE
from tests.neighbours.catalogue import Neighbour
from tests.neighbours.real import REAL
from tests.neighbours.room import room
from tests.neighbours.scene import POLICY, Scene
from tests.neighbours.written import WRITTEN
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Layout
from tpctl.spec.policy import Protocol

pytestmark = pytest.mark.root
SETTINGS = {
    "iptables-nft": ("nft", ("--engine", "iptables")),
    "nftables": ("nft", ("--engine", "nftables")),
    "iptables-legacy": ("legacy", ("--engine", "iptables")),
    "nftables-beside-legacy": ("legacy", ("--engine", "nftables")),
}
"""By name: the variant of the host's iptables, and the flags of the install."""
ORDERS = ("neighbour-first", "tpctl-first")
NEIGHBOURS: tuple[Neighbour, ...] = (*REAL, *WRITTEN)
SLICE = (
    ("ufw", "nftables", "neighbour-first"),
    ("docker", "iptables-nft", "tpctl-first"),
    ("wg-quick", "iptables-legacy", "neighbour-first"),
    ("calico", "iptables-nft", "tpctl-first"),
)
CASES = [
    (neighbour, setting, order)
    for neighbour in NEIGHBOURS
    for setting, (variant, _) in SETTINGS.items()
    for order in ORDERS
    if variant in neighbour.variants and (IS_WHOLE or (neighbour.name, setting, order) in SLICE)
]


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    neighbour, setting = request.param
    missing = [program for program in neighbour.needs if not shutil.which(program)]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")
    variant, flags = SETTINGS[setting]
    with Lab(Layout()) as lab, room(tmp_path, lab.spaces[HOST], variant) as made:
        for port in (POLICY.inbound.port, POLICY.outbound.port):
            lab.listen(HOST, Protocol.TCP, port, POLICY.proxy_uid)
        made.serve_dns(POLICY.proxy_uid, POLICY.dns.port)
        yield Scene(lab, made, neighbour, flags)


@pytest.mark.parametrize(
    ("scene", "order"),
    [pytest.param((neighbour, setting), order) for neighbour, setting, order in CASES],
    indirect=["scene"],
    ids=[f"{neighbour.name}-{setting}-{order}" for neighbour, setting, order in CASES],
)
def test_neighbour(scene: Scene, order: str, request: pytest.FixtureRequest) -> None:
    neighbour = scene.neighbour
    if order == "neighbour-first":
        scene.room.script(neighbour.start)
        alone = scene.foreign()
        scene.install()
        scene.room.tpctl("uninstall")
        assert scene.foreign() == alone
        scene.install()
    else:
        scene.install()
        scene.room.script(neighbour.start)
    scene.judge("at first")
    scene.room.script(neighbour.restart)
    scene.judge("after its restart")
    before = scene.foreign()
    scene.room.tpctl("uninstall")
    assert scene.foreign() == before
    request.node.user_properties.append(("seen", "; ".join(scene.seen)))

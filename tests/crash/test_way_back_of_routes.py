"""A change whose calls on routes and rules fail once each: addresses, routes and rules are as before, and said to be.

One policy needs routes for bound sockets and for TPROXY in both families, the other one none, so that a change from one
to the other adds or removes them all.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.crash.commands import difference
from tests.crash.scene import PROXY_FLAGS, Scene, scene
from tests.crash.server import FAIL_ONCE, Fault
from tests.extent import share
from tpctl.rehearsal.cgroup import own_place

pytestmark = [pytest.mark.root, pytest.mark.needs("cgroup", "interception", "legacy")]

ALL = ("install", *PROXY_FLAGS, "--inbound-mode", "tproxy")
NONE = ("install", *PROXY_FLAGS, "--ip-family-mode", "ipv4", "--redirect-outbound=false")
ONE_FAMILY = (*ALL, "--ip-family-mode", "ipv4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with own_place() as place, scene("nftables", place, tmp_path_factory.mktemp("scene")) as one:
        yield one


def held(made: Scene) -> dict[str, str]:
    """What the kernel holds; the order of chains of different priorities has no meaning."""
    found = {name: text for name, text in made.held().items() if not name.startswith("/run")}
    return {name: "\n".join(sorted(text.splitlines())) for name, text in found.items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, ALL), (ALL, NONE), (NONE, ALL), (ALL, ONE_FAMILY)],
    ids=["nothing to all", "all to none", "none to all", "both families to one"],
)
def test_routes_are_as_before(made: Scene, before: tuple[str, ...] | None, after: tuple[str, ...]) -> None:
    def begin() -> None:
        made.uninstall()
        if before:
            made.host.ok(*before, *made.flags)

    begin()
    stood = held(made)
    points = made.host.ok(*after, *made.flags).points
    became = held(made)
    begin()
    assert difference(became, stood)
    kinds = ("sendto rtnetlink", "sendmsg nf_tables", "rename /run/")
    tried = [at for at, point in enumerate(points, 1) if point.startswith(kinds)]
    assert any("rtnetlink" in points[at - 1] for at in tried)
    for at in tried[:: share(3, 1)]:
        done = made.host(*after, *made.flags, faults=(Fault(FAIL_ONCE, at, errno.ENOMEM),))
        where = f"{at} ({points[at - 1]}): {done}"
        if done.exit == 0:  # the engine does without what was refused
            assert not difference(held(made), became), where
            begin()
        assert not difference(held(made), stood), where
    made.uninstall()
    assert made.held() == made.base

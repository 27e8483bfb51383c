"""With `--vnet`, an install tells of other software's rules for forwarded packets, which containers no longer meet."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.netns.hostile_room import Room, ok, room

pytestmark = pytest.mark.root

VNET = ("--vnet", "docker0:172.17.0.0/16")
NATIVE = """
table inet other {
    chain harmless { type filter hook forward priority 10; accept; }
    chain forwards { type filter hook forward priority 0; ip daddr 10.0.0.0/8 jump strict; }
    chain strict { counter drop; }
}
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Room]:
    with room() as made:
        yield made


def warned(host: Room, *flags: str) -> list[str]:
    """The warnings of an install that are about forwarded packets."""
    notices = json.loads(ok(host.install("--json", *flags)))["notices"]
    ok(host.tpctl("uninstall"))
    return [notice for notice in notices if "forwarded packets no longer apply" in notice]


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_rules_of_docker_user_are_named(host: Room, variant: str) -> None:
    tool = f"iptables-{variant}"
    ok(host.run(tool, "-N", "DOCKER-USER"))
    ok(host.run(tool, "-A", "FORWARD", "-j", "DOCKER-USER"))
    ok(host.run(tool, "-A", "DOCKER-USER", "-j", "RETURN"))
    assert warned(host, *VNET) == []
    ok(host.run(tool, "-I", "DOCKER-USER", "-o", "eth0", "-p", "tcp", "--dport", "25", "-j", "REJECT"))
    ok(host.run(tool, "-P", "FORWARD", "DROP"))
    for engine in (("--engine", "nftables"), ("--engine", "iptables", "--iptables-mode", variant)):
        (notice,) = warned(host, *VNET, *engine)
        assert notice.startswith("warning: --vnet: ")
        assert "DOCKER-USER" in notice
        assert "FORWARD (policy" in notice
        assert f"uid {65534}" in notice
    assert warned(host) == []
    assert warned(host, "--vnet", "docker0:fd00::/64") == []
    for words in (("-P", "FORWARD", "ACCEPT"), ("-F",), ("-X",)):
        ok(host.run(tool, *words))


def test_forward_chains_of_nftables_are_named(host: Room) -> None:
    ok(host.run("nft", NATIVE))
    (notice,) = warned(host, *VNET)
    assert "table inet other, chain strict" in notice
    ok(host.run("nft", "delete table inet other"))
    assert warned(host, *VNET) == []

"""What filters on lo see of a redirected DNS query: the source that it gets (d5), and back again."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from tpctl.arrival.journey import Trip, packets
from tpctl.engines.foreign import Hook
from tpctl.spec.connection import Direction
from tpctl.spec.policy import Address, Family

OWN: Address = ip_address("10.0.0.5")
SERVER: Address = ip_address("10.0.0.53")
LOCAL: Address = ip_address("127.0.0.1")
REPLY = True


@pytest.mark.parametrize(("protocol", "port", "source"), [("udp", 15053, LOCAL), ("tcp", 15001, OWN)])
def test_the_source_behind_postrouting(protocol: str, port: int, source: Address) -> None:
    trip = Trip(
        Direction.OUTBOUND, Family.IPV4, protocol, "eth0", 53, (OWN,), (SERVER,), redirected_to=port,
    )  # fmt: skip
    seen = {(packet.hook, packet.is_reply, packet.priorities[1] > 0): packet for packet in packets(trip)}
    assert seen[Hook.INPUT, not REPLY, True].sources == (source,)
    assert seen[Hook.INPUT, not REPLY, True].destinations == (LOCAL,)
    assert seen[Hook.OUTPUT, REPLY, False].destinations == (source,)
    for hook in (Hook.OUTPUT, Hook.INPUT):
        assert seen[hook, REPLY, True].destinations == (OWN,)
    assert seen[Hook.INPUT, REPLY, True].sources == (SERVER,)

"""A policy survives the state file."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from tpctl.spec.document import from_document, to_document
from tpctl.spec.exclusions import Interfaces, Mark
from tpctl.spec.policy import (
    MAX_UID,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    UidExclusion,
    UidRange,
    VirtualNetwork,
)

numbers = st.integers(1, 65535)
ports = st.lists(st.builds(lambda a, b: PortRange(min(a, b), max(a, b)), numbers, numbers), max_size=4).map(tuple)
uids = st.integers(0, MAX_UID)
uid_ranges = st.builds(lambda a, b: UidRange(min(a, b), max(a, b)), uids, uids)
networks = st.lists(
    st.sampled_from(["10.0.0.0/8", "192.0.2.1/32", "fd00::/8", "::/0", "2001:db8::1/128"]).map(ip_network), max_size=3
).map(tuple)
servers = st.lists(
    st.sampled_from([NameServer(ip_address("127.0.0.53")), NameServer(ip_address("fe80::1"), "eth0")]), max_size=2
).map(tuple)
policies = st.builds(
    Policy,
    proxy_uid=uids,
    families=st.sampled_from([frozenset(Family), frozenset({Family.IPV4})]),
    loopback=st.just("lo"),
    inbound=st.builds(Inbound, st.booleans(), numbers, ports, ports, networks, st.booleans()),
    outbound=st.builds(
        Outbound,
        st.booleans(),
        numbers,
        ports,
        ports,
        networks,
        st.lists(st.builds(UidExclusion, st.sampled_from(Protocol), ports, uid_ranges), max_size=3).map(tuple),
        st.sampled_from([(), (Mark(0x80000, 0xFF0000), Mark(51820))]),
        st.booleans(),
    ),
    dns=st.builds(Dns, st.sampled_from(DnsCapture), numbers, servers, st.booleans(), st.booleans()),
    virtual_networks=st.lists(
        st.builds(VirtualNetwork, st.sampled_from(["br+", "docker0"]), st.sampled_from([ip_network("10.0.0.0/8")])),
        max_size=2,
    ).map(tuple),
    exclude_interfaces=st.sampled_from([(), (Interfaces("tun0"), Interfaces("wg+"))]),
    drop_invalid=st.booleans(),
    guard_ports=st.booleans(),
    log_level=st.none() | st.integers(0, 7),
)


@given(policies)
def test_round_trip_through_json(policy: Policy) -> None:
    assert from_document(json.loads(json.dumps(to_document(policy)))) == policy

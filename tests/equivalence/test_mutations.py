"""The suite finds out broken engines: a slice of `make test-mutations`, and its parts without root."""

from __future__ import annotations

import ipaddress

import pytest

from tests.equivalence import engines, mutate, shrink
from tests.equivalence.mutation_policies import POLICIES
from tests.equivalence.paste import as_code
from tpctl.spec import decide, policy
from tpctl.spec.policy import DnsCapture, Family, Inbound, Policy, PortRange

_MUTANTS = 12
_ALLOWED_SURVIVORS = 1


@pytest.mark.root
@pytest.mark.needs("cgroup")
@pytest.mark.parametrize("name", ["nftables", "iptables-nft"])
def test_broken_engines_are_found_out(name: str) -> None:
    tally = mutate.challenge(engines.DOORS[name], _MUTANTS)
    assert tally.tried.total() + tally.refused == _MUTANTS
    assert len(tally.survivors) <= _ALLOWED_SURVIVORS, "\n".join(tally.survivors)


@pytest.mark.parametrize("wanted", POLICIES)
def test_code_evaluates_to_what_it_was_made_from(wanted: Policy) -> None:
    names = {**vars(policy), **vars(decide), **vars(ipaddress)}
    assert eval(as_code(wanted), names) == wanted


def test_a_policy_shrinks_to_what_matters() -> None:
    """Of everything in the policy only one range of excluded ports is at fault, and only that is left."""
    guilty = PortRange(8000, 8010)
    small = shrink.shrunk(POLICIES[0], lambda candidate: guilty in candidate.inbound.exclude_ports)
    assert small == Policy(proxy_uid=5678, inbound=Inbound(exclude_ports=(guilty,)))


def test_a_policy_shrinks_to_the_combination_that_matters() -> None:
    def is_wrong(candidate: Policy) -> bool:
        return candidate.dns.capture is DnsCapture.ALL and len(candidate.virtual_networks) > 1

    small = shrink.shrunk(POLICIES[1], is_wrong)
    assert small.dns == policy.Dns(DnsCapture.ALL)
    assert len(small.virtual_networks) == 2
    assert small.inbound == Inbound()
    assert small.families == frozenset(Family)

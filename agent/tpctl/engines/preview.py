"""What an install would give to the kernel, without giving it."""

from __future__ import annotations

import os

from tpctl.engines import registry
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Policy
from tpctl.system.errors import HostError


def ruleset(policy: Policy, options: EngineOptions) -> str:
    """Exactly what the kernel would be given. Touches nothing and needs no privilege.

    What would be replaced is included when it can be seen, that is, as root on a host where the engine works.
    """
    if os.geteuid() == 0:
        try:
            return registry.select(options).engine.preview(policy)
        except HostError:
            if options.engine in ("nftables", "ebpf"):
                raise
    if options.engine == "ebpf":
        from tpctl.engines.ebpf.plan import plan_for

        return plan_for(policy, comments=options.comments).render()
    if options.engine == "iptables" or options.iptables_because or not _has_nftables():
        from tpctl.engines.iptables.plan import IptablesPlan

        return IptablesPlan.of_policy(policy, options).render()
    from tpctl.engines.nftables.engine import NftablesPlan

    return NftablesPlan.of_policy(policy, options).render()


def _has_nftables() -> bool:
    from tpctl.engines.nftables.nft import find

    try:
        find()
    except HostError:
        return False
    return True

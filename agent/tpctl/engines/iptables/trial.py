"""What this kernel and these programs take of what not every host has, tried where it acts on no traffic.

REDIRECT is a module of its own, DNAT is in another (CONFIG_NETFILTER_XT_NAT), and refusing is in one a family
(CONFIG_IP_NF_TARGET_REJECT, CONFIG_IP6_NF_TARGET_REJECT).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from tpctl.engines.iptables.change import change, restore_text
from tpctl.engines.iptables.guard import filtering
from tpctl.engines.iptables.parts import Parts
from tpctl.engines.iptables.saved import SavedTable
from tpctl.engines.iptables.tools import Tools
from tpctl.spec.policy import Family, Policy
from tpctl.system import runner
from tpctl.system.errors import ApplyError
from tpctl.system.networks import into_own_network
from tpctl.system.threads import in_thread

_TEXT = "*nat\n:TPCTL_TRIAL - [0:0]\n-A TPCTL_TRIAL -p tcp -j %s\nCOMMIT\n"
_DNAT, _REDIRECT = _TEXT % "DNAT --to-destination :15006", _TEXT % "REDIRECT --to-ports 15006"
_HELD = "Another app is currently holding"
_PATIENCE = 9
"""Times what one program may take: a family needs four at most. Each ends by itself, or is ended."""
LOCK_OF_ITS_OWN = {"XTABLES_LOCKFILE": "/proc/self/environ"}
"""iptables-legacy-restore would wait for the lock that is held for it. What it locks instead is there for each process,
and only root can open it (xtables_lock() in iptables/xshared.c; since iptables 1.8.6)."""


@dataclass(frozen=True, slots=True)
class Ability:
    """What worked."""

    dnat: bool = True
    """A rule that changes a port alone."""
    guard_obstacle: str | None = None
    """Why the data plane's own ports cannot be guarded."""


@functools.lru_cache(maxsize=8)
def abilities(programs: tuple[Tools, ...]) -> Mapping[Family, Ability]:
    """What these programs and the kernel can do, tried in a network namespace that is gone afterwards.

    DNAT is missing only if REDIRECT works there: whatever else is wrong, also where there is no right to make a
    namespace, shows when the rules are applied.
    """
    try:
        return in_thread(lambda: _tried_elsewhere(programs), seconds=_PATIENCE * runner.TIMEOUT_SECONDS)
    except (OSError, MemoryError, ApplyError):
        return {tools.family: Ability() for tools in programs}


def _tried_elsewhere(programs: tuple[Tools, ...]) -> dict[Family, Ability]:
    """Leaves the calling thread in a namespace of its own. Raises OSError when the kernel refuses one."""
    into_own_network()
    return {tools.family: _tried(tools) for tools in programs}


def _tried(tools: Tools) -> Ability:
    try:
        guard = _guard(tools.family)
        if _refusal(tools, _DNAT + guard) is None:
            return Ability()
        dnat = _refusal(tools, _DNAT) is None or _refusal(tools, _REDIRECT) is not None
        return Ability(dnat, _refusal(tools, guard))
    except (OSError, ApplyError):
        return Ability()


def _guard(family: Family) -> str:
    rules = filtering(Parts(Policy(proxy_uid=0), family))
    return restore_text((change(SavedTable("filter"), rules),), comments=False)


def _refusal(tools: Tools, text: str) -> str | None:
    """Why a text is refused; None when it is taken."""
    done = runner.run([tools.restore, "--noflush"], stdin=text, variables=LOCK_OF_ITS_OWN)
    # The lock of iptables before 1.8.6 may be somebody else's at the moment.
    return None if done.ok or _HELD in done.stderr else done.failure()

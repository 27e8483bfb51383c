"""The match of nf_tables for control groups: `socket cgroupv2 level N "PATH"` (nft(8)).

The rule holds a number. nft takes it from the directory of that path below /sys/fs/cgroup when the rule is made, so the
rule goes on meaning a dead group when the service is started anew. The kernel compares it with the socket's group, or
that one's ancestor at the level (net/netfilter/nft_socket.c). Packets without a socket, and sockets of groups that lie
less deep, never match, not even negated; so the rules ask only whether a packet is inside.

Levels are counted from the root of the hierarchy; since Linux 6.11, and in later updates of 6.1 and 6.6, from the root
of the control group namespace of whoever makes the rule, as paths are. The two differ in a container with such a
namespace of its own: there, on an older kernel, nothing matches.
"""

from __future__ import annotations

import os
from pathlib import Path

from tpctl.engines.nftables.nft import Nft, NftError
from tpctl.host import cgroups
from tpctl.spec.policy import Cgroup
from tpctl.system.errors import HostError

_SEARCHED = Path("/sys/fs/cgroup")
"""SYSFS_CGROUPSV2_PATH in nftables' src/socket.c; nft takes no plain number in a path's place (run, 1.0.6)."""
_PROBE = "table inet tpctl_probe {\n\tchain output {\n\t\t%s accept\n\t}\n}\n"


def match(cgroup: Cgroup) -> str:
    """Matches packets of sockets that were made in a control group, or in one below it."""
    return _match(cgroup.level, cgroup.path)


def _match(level: int, path: str) -> str:
    return f'socket cgroupv2 level {level} "{path}"'


def found_by_nft(text: str, cgroup: Cgroup | None) -> str:
    """A text with the group named so that nft finds its directory. Raises HostError when there is none.

    Under /sys/fs/cgroup it is not, where the hierarchy is mounted elsewhere (/sys/fs/cgroup/unified), or under
    `ip netns exec`, which mounts a /sys of its own. But the path may lead out of there.
    """
    if cgroup is None:
        return text
    cgroups.find(cgroup.path)
    directory = cgroups.root() / cgroup.path
    if directory == _SEARCHED / cgroup.path:
        return text
    outside = "/".join([".."] * (len(_SEARCHED.parts) - 1)) + str(directory)
    return text.replace(match(cgroup), _match(cgroup.level, outside))


def require(nft: Nft, cgroup: Cgroup | None) -> None:
    """Let nft and the kernel judge the match, without carrying it out. Raises HostError."""
    if cgroup is None:
        return
    try:
        nft.check(found_by_nft(_PROBE % match(cgroup), cgroup))
    except NftError as refused:
        raise HostError(
            f"--cgroup does not work with nftables here: {nft.description} says {refused}. It needs Linux 5.13 or "
            f"later (this is {os.uname().release}) and nft 0.9.9 or later; use --engine iptables instead"
        ) from refused

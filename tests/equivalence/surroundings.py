"""What stands around the engine in the host's namespace: somebody else's firewall, and conntrack to be forgotten.

The firewall makes conntrack zones visible. NAT of DNS works in the wrong zone too, as long as nobody reuses a port; but
an answer whose zone is not its query's belongs to no connection, and a stateful firewall drops it.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST
from tpctl.spec.policy import DNS_PORT, RESERVED, DnsCapture, Family, Policy

IDLE_PORTS = range(18000, 19000)
"""Connections from these source ports are kept from conntrack while `idle` says so."""
_TABLE = "inet surroundings"
_NETLINK_NETFILTER = 12
_CONNTRACK_DELETE = 1 << 8 | 2
"""NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE: without a tuple it deletes every entry of the namespace."""
_REQUEST_WITH_ACK = 5


class Surroundings:
    """The surroundings of one laboratory's host."""

    def __init__(self, lab: Lab) -> None:
        import nftables

        self._library: Any = nftables.Nftables
        self._lab = lab
        self._resolvers: tuple[str, ...] = ()
        with lab.inside(HOST):
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        new_answer = f"udp sport {DNS_PORT} ct state new drop"
        self._nft(
            f"table {_TABLE} {{\n"
            "chain idle_in { type filter hook prerouting priority -450; }\n"
            "chain idle_out { type filter hook output priority -450; }\n"
            "chain resolvers { }\n"
            f"chain input {{ type filter hook input priority 0; jump resolvers; iifname != lo {new_answer}; }}\n"
            f"chain output {{ type filter hook output priority 0; oifname != lo {new_answer}; }}\n"
            f"chain forward {{ type filter hook forward priority 0; {new_answer}; }}\n"
            "}\n"
        )

    def close(self) -> None:
        """Nothing is left but what dies with the namespace."""
        self._netlink.close()

    def suit(self, policy: Policy) -> None:
        """Judge the answers of the local resolvers whose zone the policy looks after."""
        wanted = tuple(_resolvers(policy))
        if wanted != self._resolvers:
            rules = "".join(f"add rule {_TABLE} resolvers {rule}\n" for rule in wanted)
            self._nft(f"flush chain {_TABLE} resolvers\n{rules}")
            self._resolvers = wanted

    def idle(self, conntrack: bool) -> None:
        """Whether conntrack takes no notice of connections from `IDLE_PORTS`, as on a host where nobody uses it."""
        ports = f"{IDLE_PORTS[0]}-{IDLE_PORTS[-1]}"
        text = "".join(f"flush chain {_TABLE} {chain}\n" for chain in ("idle_in", "idle_out"))
        if conntrack:
            for chain in ("idle_in", "idle_out"):
                text += f"add rule {_TABLE} {chain} tcp sport {ports} notrack\n"
                text += f"add rule {_TABLE} {chain} tcp dport {ports} notrack\n"
        self._nft(text)

    def forget_connections(self) -> None:
        """Empty the host's conntrack, so that no verdict of an earlier policy is remembered."""
        message = struct.pack("=IHHII", 20, _CONNTRACK_DELETE, _REQUEST_WITH_ACK, 1, 0) + bytes(4)
        self._netlink.send(message)
        self._netlink.recv(4096)

    def _nft(self, text: str) -> None:
        with self._lab.inside(HOST):
            code, _, error = self._library().cmd(text)
        assert code == 0, error


def _resolvers(policy: Policy) -> list[str]:
    if policy.dns.capture is not DnsCapture.LISTED:
        return []
    return [
        f"iifname lo {ip} saddr {server.address} {ip} daddr {RESERVED[family].local.network_address} "
        f"udp sport {DNS_PORT} ct state new drop"
        for family, ip in ((Family.IPV4, "ip"), (Family.IPV6, "ip6"))
        if policy.splits_zones(family) and family in policy.families
        for server in policy.servers(family)
        if server.address.is_loopback
    ]

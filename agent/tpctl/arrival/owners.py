"""Whose a rule looks like, by the names that each software gives its tables and chains. Pure."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator

from tpctl.engines.foreign import Place


class Owner(enum.StrEnum):
    """Software that keeps rules of its own."""

    UFW = "ufw"
    FIREWALLD = "firewalld"
    TAILSCALE = "tailscale"
    WG_QUICK = "wg-quick"
    DOCKER = "Docker"
    KUBE_PROXY = "kube-proxy"
    KUBELET = "kubelet"
    PODMAN = "podman"
    FAIL2BAN = "fail2ban"
    CROWDSEC = "CrowdSec"
    CALICO = "calico"
    CILIUM = "cilium"
    LIBVIRT = "libvirt"
    CSF = "csf"
    SHOREWALL = "shorewall"
    FERM = "ferm"
    NETWORKMANAGER = "NetworkManager"
    MULLVAD = "mullvad"
    NORDVPN = "nordvpn"
    ISTIO = "istio"
    LINKERD = "linkerd"
    KUMACTL = "kumactl"
    TPCTL = "tpctl"
    ADMINISTRATOR = "an administrator"
    """Nothing tells of anybody else: rules of /etc/nftables.conf, of iptables-persistent, or made by hand."""


_CHAINS: tuple[tuple[str, Owner], ...] = (
    (r"ufw6?-", Owner.UFW),
    (r"(IN|FWD|FWDI|FWDO|OUT|PRE|POST)_\w+|(INPUT|FORWARD|OUTPUT|PREROUTING|POSTROUTING)_(direct|ZONES\w*|POLICIES_\w+|"
     r"IN_ZONES\w*|OUT_ZONES\w*|IN_POLICIES\w*|OUT_POLICIES\w*)|RFC3964_IPv4", Owner.FIREWALLD),
    (r"ts-\w+", Owner.TAILSCALE),
    (r"DOCKER.*", Owner.DOCKER),
    (r"KUBE-(FIREWALL|KUBELET-.*|MARK-DROP)", Owner.KUBELET),
    (r"KUBE-.*", Owner.KUBE_PROXY),
    (r"(NETAVARK|CNI-).*", Owner.PODMAN),
    (r"(f2b|fail2ban)-.*", Owner.FAIL2BAN),
    (r"(?i:crowdsec).*", Owner.CROWDSEC),
    (r"cali-.*", Owner.CALICO),
    (r"(OLD_)?CILIUM_.*", Owner.CILIUM),
    (r"LIBVIRT_.*|guest_(in|out)put|guest_cross", Owner.LIBVIRT),
    (r"LOCALINPUT|LOCALOUTPUT|ALLOWIN|DENYIN|DENYOUT|LOGDROPIN|LOGDROPOUT", Owner.CSF),
    (r"(fw|net|loc|dmz)[2-](fw|net|loc|dmz|all)|sfilter|smurfs|~log\d+", Owner.SHOREWALL),
    (r"nm-sh-(in|fw)-.*", Owner.NETWORKMANAGER),
    (r"ISTIO_.*", Owner.ISTIO),
    (r"PROXY_INIT_.*", Owner.LINKERD),
    (r"KUMA_MESH_.*", Owner.KUMACTL),
    (r"TPCTL_.*", Owner.TPCTL),
)  # fmt: skip
_TABLES: tuple[tuple[str, Owner], ...] = (
    (r"inet tpctl(_ebpf|_answers)?", Owner.TPCTL),
    (r"(inet|ip|ip6) firewalld\w*", Owner.FIREWALLD),
    (r"\w+ wg-quick-.*", Owner.WG_QUICK),
    (r"\w+ docker-bridges|\w+ docker.*", Owner.DOCKER),
    (r"\w+ kube-proxy", Owner.KUBE_PROXY),
    (r"\w+ netavark.*", Owner.PODMAN),
    (r"\w+ f2b-table", Owner.FAIL2BAN),
    (r"\w+ (?i:crowdsec).*", Owner.CROWDSEC),
    (r"\w+ (calico.*|cali-.*)", Owner.CALICO),
    (r"\w+ libvirt_network", Owner.LIBVIRT),
    (r"\w+ tailscale.*", Owner.TAILSCALE),
    (r"\w+ nm-(shared-|mlag-|sh-).*", Owner.NETWORKMANAGER),
    (r"\w+ mullvad\w*", Owner.MULLVAD),
    (r"\w+ nordvpn.*", Owner.NORDVPN),
)
_RULES: tuple[tuple[str, Owner], ...] = (
    (r"wg-quick\(8\) rule for", Owner.WG_QUICK),
    (r"--match-set crowdsec|@crowdsec", Owner.CROWDSEC),
    (r"--match-set f2b-|@(addr|addr6)-set-", Owner.FAIL2BAN),
    (r"--match-set cali\d+|cali:", Owner.CALICO),
    (r"--comment \"?nordvpn", Owner.NORDVPN),
)
"""What stands in a rule, where its chain tells nothing."""


def owner_of(place: Place) -> Owner:
    """Whose the rule or policy at a place looks like."""
    return next(_named(place), Owner.ADMINISTRATOR)


def owner_of_chain(name: str) -> Owner | None:
    """Whose a chain looks like by its name alone, of iptables."""
    return next((owner for pattern, owner in _CHAINS if re.fullmatch(f"(?:{pattern})(?:.*)?", name)), None)


def _named(place: Place) -> Iterator[Owner]:
    where = f"{place.table.family} {place.table.name}"
    if not place.table.is_iptables:
        yield from (owner for pattern, owner in _TABLES if re.fullmatch(pattern, where))
    target = (place.rule.target,) if place.rule else ()
    for name in (*target, *reversed(place.path or (place.chain.name,))):  # the innermost chain tells best
        if (owner := owner_of_chain(name)) is not None:
            yield owner
    text = place.rule.text if place.rule else ""
    yield from (owner for pattern, owner in _RULES if re.search(pattern, text))
    if place.rule is None:  # a policy: of whoever's chain the base chain calls, as ufw and firewalld set it
        yield from _policy_of(place)


def _policy_of(place: Place) -> Iterator[Owner]:
    called = [owner_of_chain(rule.target) for rule in place.chain.rules if rule.target]
    yield from (owner for owner in (Owner.UFW, Owner.FIREWALLD, Owner.CSF, Owner.SHOREWALL) if owner in called)

"""The one rule to add, in the words of the software whose rule is in the way. Pure."""

from __future__ import annotations

from collections.abc import Callable

from tpctl.arrival.owners import Owner
from tpctl.arrival.packets import LOOPBACK, Packet
from tpctl.engines.foreign import Hook, Place
from tpctl.spec.policy import Family


def remedy(owner: Owner, place: Place, packet: Packet) -> str:
    """One command (or setting) that lets such packets pass this place."""
    own = _OWN.get(owner)
    return (own(place, packet) if own else None) or _insert(place, packet)


def keeping(owner: Owner, place: Place) -> str:
    """How to keep such a rule, where the command alone does not."""
    if owner is Owner.FIREWALLD:
        return (
            "its reload takes away the rules of the iptables engine, unless `tpctl persist --firewalld` stored them; "
            "`tpctl apply` brings them back"
        )
    if owner in (Owner.UFW, Owner.CSF):
        return ""  # their commands write it down
    if owner in _KEEPERS:
        return _KEEPERS[owner]
    if owner is not Owner.ADMINISTRATOR:
        return f"it is lost when {owner} makes its rules anew; have a systemd unit run the command again after that"
    return "also write it into /etc/nftables.conf" if not place.table.is_iptables else "then netfilter-persistent save"


_KEEPERS = {
    Owner.WG_QUICK: "also write it as PostUp into the interface's file in /etc/wireguard, see wg-quick(8)",
    Owner.TAILSCALE: "tailscaled puts its own jump back to the top when it starts: "
    "tailscale set --netfilter-mode=nodivert leaves the jumps to you",
    Owner.FAIL2BAN: "or name the address in ignoreip of /etc/fail2ban/jail.local",
    Owner.CROWDSEC: "or put the address on a list: cscli allowlists add",
    Owner.CALICO: "to keep it, use a calico policy for the host endpoint, or failsafeInboundHostPorts",
}


def _insert(place: Place, packet: Packet) -> str:
    base = place.base.name
    if not place.table.is_iptables:
        return f"nft insert rule {place.table.family} {place.table.name} {base} {_nft_match(packet)} accept"
    table = "" if place.table.name == "filter" else f" -t {place.table.name}"
    translated = _TRANSLATED if packet.is_translated and place.table.name != "raw" else ""
    return f"{place.table.program}{table} -I {base} {_iptables_match(packet)}{translated} -j ACCEPT"


_TRANSLATED = " -m conntrack --ctstate DNAT"
"""At the top of a chain of iptables' own, the rule comes before the guard of the data plane's ports (g1), which has to
see what is aimed at them. Conntrack tells the two apart, except in the table raw, which comes before it."""


def _nft_match(packet: Packet) -> str:
    if _only_loopback(packet):
        return f'{"oifname" if packet.hook in _SENDING else "iifname"} "lo"'
    address = f"{'ip' if packet.family is Family.IPV4 else 'ip6'}"
    if packet.is_reply:
        side, port = "sport", packet.source_port
    else:
        side, port = "dport", packet.destination_port
    where = ""
    if packet.hook in _SENDING and not packet.is_reply and packet.is_translated:
        where = f"{address} daddr {packet.destinations[0]} "
    return f"{where}{packet.protocol} {side} {port}"


def _iptables_match(packet: Packet) -> str:
    if _only_loopback(packet):
        return f"{'-o' if packet.hook in _SENDING else '-i'} {LOOPBACK}"
    where = ""
    if packet.hook in _SENDING and not packet.is_reply and packet.is_translated:
        where = f"-d {packet.destinations[0]} "
    if packet.is_reply:
        return f"{where}-p {packet.protocol} --sport {packet.source_port}"
    return f"{where}-p {packet.protocol} --dport {packet.destination_port}"


_SENDING = (Hook.OUTPUT, Hook.POSTROUTING)


def _only_loopback(packet: Packet) -> bool:
    return LOOPBACK in (packet.in_interface, packet.out_interface)


def _ufw(place: Place, packet: Packet) -> str | None:
    if packet.is_reply or packet.hook not in (Hook.INPUT, Hook.OUTPUT):
        return None
    if packet.hook is Hook.INPUT:
        if _only_loopback(packet):
            return "ufw allow in on lo"
        return f"ufw allow in proto {packet.protocol} to any port {packet.destination_port}"
    if _only_loopback(packet):
        return "ufw allow out on lo"
    where = packet.destinations[0] if packet.destinations else "any"
    return f"ufw allow out proto {packet.protocol} to {where} port {packet.destination_port}"


def _firewalld(place: Place, packet: Packet) -> str | None:
    if "RFC3964_IPv4" in place.text or (place.rule is not None and "::ffff:" in place.rule.text):
        return "set RFC3964_IPv4=no in /etc/firewalld/firewalld.conf and run firewall-cmd --reload"
    if packet.hook is Hook.INPUT and not packet.is_reply:
        if _only_loopback(packet):
            return "firewall-cmd --permanent --zone=trusted --add-interface=lo && firewall-cmd --reload"
        port = f"{packet.destination_port}/{packet.protocol}"
        return f"firewall-cmd --permanent --add-port={port} && firewall-cmd --reload"
    if packet.hook is Hook.OUTPUT:
        family = "ipv4" if packet.family is Family.IPV4 else "ipv6"
        match = _iptables_match(packet)
        return (
            f"firewall-cmd --permanent --direct --add-rule {family} filter OUTPUT 0 {match} -j ACCEPT "
            "&& firewall-cmd --reload"
        )
    return None


def _fail2ban(place: Place, packet: Packet) -> str | None:
    address = f"{packet.sources[0]}" if packet.sources and not packet.is_reply else None
    return f"fail2ban-client unban {address}" if address else None


def _crowdsec(place: Place, packet: Packet) -> str | None:
    address = f"{packet.sources[0]}" if packet.sources and not packet.is_reply else None
    return f"cscli decisions delete --ip {address}" if address else None


def _csf(place: Place, packet: Packet) -> str | None:
    if packet.hook is Hook.INPUT and not packet.is_reply and not _only_loopback(packet):
        return f"add {packet.destination_port} to TCP_IN in /etc/csf/csf.conf and run csf -r"
    return None


_OWN: dict[Owner, Callable[[Place, Packet], str | None]] = {
    Owner.UFW: _ufw,
    Owner.FIREWALLD: _firewalld,
    Owner.FAIL2BAN: _fail2ban,
    Owner.CROWDSEC: _crowdsec,
    Owner.CSF: _csf,
}

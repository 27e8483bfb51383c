"""A policy as plain data for the state file and JSON output, and back."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import Any

from tpctl.spec.exclusions import MAX_MARK, Interfaces, Mark
from tpctl.spec.policy import (
    BoundSockets,
    Cgroup,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    PortRange,
    Ports,
    Protocol,
    Redirection,
    UidExclusion,
    UidRange,
    VirtualNetwork,
    WhenProxyDown,
)

Document = dict[str, Any]


def to_document(policy: Policy) -> Document:
    """The policy as JSON types. Ranges, addresses and networks are text."""
    inbound, outbound, dns = policy.inbound, policy.outbound, policy.dns
    return {
        "proxyUid": policy.proxy_uid,
        "families": sorted(int(family) for family in policy.families),
        "loopback": policy.loopback,
        "inbound": {
            "enabled": inbound.enabled,
            "port": inbound.port,
            "includePorts": _texts(inbound.include_ports),
            "excludePorts": _texts(inbound.exclude_ports),
            "excludeSources": _texts(inbound.exclude_sources),
            "insert": inbound.insert,
            "mode": str(inbound.mode),
        },
        "outbound": {
            "enabled": outbound.enabled,
            "port": outbound.port,
            "includePorts": _texts(outbound.include_ports),
            "excludePorts": _texts(outbound.exclude_ports),
            "excludeDestinations": _texts(outbound.exclude_destinations),
            "excludeUids": [
                {"protocol": str(rule.protocol), "ports": _texts(rule.ports), "uids": str(rule.uids)}
                for rule in outbound.exclude_uids
            ],
            "excludeMarks": _texts(outbound.exclude_marks),
            "insert": outbound.insert,
        },
        "dns": {
            "capture": str(dns.capture),
            "port": dns.port,
            "servers": _texts(dns.servers),
            "tcp": dns.tcp,
            "splitZones": dns.split_zones,
        },
        "virtualNetworks": [
            {"interface": vnet.interface, "network": str(vnet.network)} for vnet in policy.virtual_networks
        ],
        "excludeInterfaces": _texts(policy.exclude_interfaces),
        "dropInvalid": policy.drop_invalid,
        "guardPorts": policy.guard_ports,
        "logLevel": policy.log_level,
        "whenProxyDown": str(policy.when_proxy_down),
        "cgroup": {"path": policy.cgroup.path, "number": policy.cgroup.number} if policy.cgroup else None,
        "boundSockets": str(policy.bound_sockets),
    }


def from_document(document: Mapping[str, Any]) -> Policy:
    """The policy of a document. Raises ValueError, TypeError or KeyError if `to_document` did not make it."""
    inbound, outbound, dns = document["inbound"], document["outbound"], document["dns"]
    return Policy(
        proxy_uid=UidRange(int(document["proxyUid"])).first,
        families=frozenset(Family(family) for family in document["families"]),
        loopback=_name(document["loopback"]),
        inbound=Inbound(
            enabled=bool(inbound["enabled"]),
            port=_port(inbound["port"]),
            include_ports=_ports(inbound["includePorts"]),
            exclude_ports=_ports(inbound["excludePorts"]),
            exclude_sources=tuple(ip_network(text) for text in inbound["excludeSources"]),
            insert=bool(inbound["insert"]),
            mode=Redirection(inbound.get("mode", Redirection.REDIRECT)),
        ),
        outbound=Outbound(
            enabled=bool(outbound["enabled"]),
            port=_port(outbound["port"]),
            include_ports=_ports(outbound["includePorts"]),
            exclude_ports=_ports(outbound["excludePorts"]),
            exclude_destinations=tuple(ip_network(text) for text in outbound["excludeDestinations"]),
            exclude_uids=tuple(
                UidExclusion(Protocol(rule["protocol"]), _ports(rule["ports"]), UidRange(*_bounds(rule["uids"])))
                for rule in outbound["excludeUids"]
            ),
            exclude_marks=tuple(_mark(text) for text in outbound.get("excludeMarks", ())),
            insert=bool(outbound["insert"]),
        ),
        dns=Dns(
            capture=DnsCapture(dns["capture"]),
            port=_port(dns["port"]),
            servers=tuple(_server(text) for text in dns["servers"]),
            tcp=bool(dns["tcp"]),
            split_zones=bool(dns["splitZones"]),
        ),
        virtual_networks=tuple(
            VirtualNetwork(_name(vnet["interface"]), ip_network(vnet["network"]))
            for vnet in document["virtualNetworks"]
        ),
        exclude_interfaces=tuple(Interfaces(_name(text)) for text in document.get("excludeInterfaces", ())),
        drop_invalid=bool(document["dropInvalid"]),
        guard_ports=bool(document.get("guardPorts", False)),  # without it, by a version that had no guard
        log_level=None if document["logLevel"] is None else int(document["logLevel"]),
        when_proxy_down=WhenProxyDown(document.get("whenProxyDown", WhenProxyDown.BLOCK)),
        cgroup=_cgroup(document.get("cgroup")),
        bound_sockets=BoundSockets(document.get("boundSockets", BoundSockets.REDIRECT)),
    )


def _cgroup(document: Mapping[str, Any] | None) -> Cgroup | None:
    if not document:
        return None
    path = str(document["path"])
    if not path.isprintable() or '"' in path:
        raise ValueError(f"{path!r} is not the path of a control group")
    return Cgroup(path, int(document["number"]))


def _port(number: object) -> int:
    return PortRange(int(str(number))).first


def _name(text: object) -> str:
    """The name of an interface, which becomes a part of rules."""
    if not isinstance(text, str) or not text.isprintable() or any(char in " \t\"'\\/;{}" for char in text):
        raise ValueError(f"{text!r} is not the name of an interface")
    return text


def _mark(text: str) -> Mark:
    value, _, mask = text.partition("/")
    return Mark(int(value, 16), int(mask, 16) if mask else MAX_MARK)


def _texts(items: tuple[object, ...]) -> list[str]:
    return [str(item) for item in items]


def _bounds(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _ports(texts: list[str]) -> Ports:
    return tuple(PortRange(*_bounds(text)) for text in texts)


def _server(text: str) -> NameServer:
    address, _, interface = text.partition("%")
    return NameServer(ip_address(address), _name(interface) if interface else None)

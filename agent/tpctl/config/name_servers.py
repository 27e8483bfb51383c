"""Whose DNS queries are captured: the servers of resolv.conf, and resolvers on this host that would ask themselves."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from tpctl.config.effective import Config
from tpctl.config.findings import Findings
from tpctl.host.facts import Host
from tpctl.host.resolvers import Resolv, parse
from tpctl.host.sockets import Listener
from tpctl.spec.policy import DNS_PORT, DnsCapture, Family, NameServer, Policy, Protocol, includes, is_scoped
from tpctl.system.errors import HostError

DOCKER_RESOLVER = IPv4Address("127.0.0.11")
"""Docker's embedded DNS server: it asks upstream from outside the container, so nothing can loop."""
_MOST_REMARKS = 5


def listed(config: Config, host: Host, found: Findings, families: frozenset[Family]) -> tuple[NameServer, ...]:
    """The servers that the C library asks; none, and a problem, when that cannot be told."""
    try:
        resolv = host.name_servers(config.resolv_conf)
    except HostError as error:
        found.problems.append(f"{config.origin('resolv_conf')}: {error}")
        return ()
    _tell(config, resolv, found)
    if resolv.is_default:
        found.notices.append(
            f"{config.resolv_conf} names no name server: programs of this host ask {resolv.servers[0]} "
            "(resolv.conf(5)), so DNS queries to it are redirected"
        )
        return resolv.servers
    for server in resolv.servers:
        if is_scoped(server.address):
            found.warn(
                f"{config.resolv_conf}: DNS queries to {server} are not redirected, the kernel cannot redirect "
                "link-local destinations; name a server with a global address"
            )
    for family in sorted(families if host.has_ipv6() else families - {Family.IPV6}):
        if not any(Family.of(server.address) is family for server in resolv.servers):
            found.warn(f"{config.resolv_conf} lists no IPv{family} name server: DNS over IPv{family} is not redirected")
    return resolv.servers


def _tell(config: Config, resolv: Resolv, found: Findings) -> None:
    for remark in resolv.remarks[:_MOST_REMARKS]:
        found.warn(f"{config.resolv_conf}: {remark}")
    if len(resolv.remarks) > _MOST_REMARKS:
        found.warn(f"{config.resolv_conf}: {len(resolv.remarks) - _MOST_REMARKS} more lines are like these")


def see_to_loops(config: Config, policy: Policy, host: Host, found: Findings) -> None:
    """A resolver on this host asks its upstream servers; if those queries are captured too, they come back to it."""
    if policy.dns.capture is DnsCapture.OFF:
        return
    try:
        resolv = host.name_servers(config.resolv_conf)
    except HostError:
        resolv = parse("")  # so does the C library with a file that it cannot read
    for server, owner in _local_resolvers(resolv, policy, host):
        uid = None if owner is None else _owner_uid(owner, host)
        if uid is not None and (uid == policy.proxy_uid or _excludes_dns_of(policy, uid)):
            continue
        if policy.dns.capture is DnsCapture.LISTED:
            _warn_of_listed(config, policy, host, found, (server, uid))
        elif uid is None and (resolv.is_default or _excludes_dns_of(policy, None)):
            _warn_of_absent(config, policy, found, (server, resolv.is_default))
        else:
            found.problems.append(
                f"{config.origin('dns_capture_all')}: {_names(config, resolv, server)}, a resolver on this host; its "
                "own queries would be redirected too and loop forever: use --redirect-dns instead, or add "
                f"{_exclusion(policy, uid)}"
            )


def _local_resolvers(resolv: Resolv, policy: Policy, host: Host) -> Iterator[tuple[NameServer, Listener | None]]:
    """The servers that are this host itself, with who listens there, if the policy concerns what they ask."""
    sockets = [one for one in host.listeners(Protocol.UDP) if one.port == DNS_PORT]
    sockets.sort(key=lambda one: one.address.is_unspecified)  # the kernel chooses one of just that address
    for server in resolv.servers:
        if server.address == DOCKER_RESOLVER or not host.is_local(server.address):
            continue
        owner = next((one for one in sockets if one.takes(server.address)), None)
        if not (owner and policy.cgroup and not policy.cgroup.holds(host.process_cgroup(owner))):
            yield server, owner


def _names(config: Config, resolv: Resolv, server: NameServer) -> str:
    if resolv.is_default:
        return f"{config.resolv_conf} names no name server, and so {server} is asked"
    return f"{config.resolv_conf} names {server}"


def _warn_of_listed(
    config: Config, policy: Policy, host: Host, found: Findings, resolver: tuple[NameServer, int | None]
) -> None:
    """Its upstream servers may be those that are listed beside it."""
    server, uid = resolver
    beside = [one for one in policy.dns.servers if one != server and not host.is_local(one.address)]
    if uid is not None and beside:
        found.warn(
            f"{config.resolv_conf} names {server}, a resolver on this host, and {', '.join(map(str, beside))}: if the "
            "former asks the latter, its own queries are redirected too, and may loop; add "
            f"{_exclusion(policy, uid)}"
        )


def _warn_of_absent(config: Config, policy: Policy, found: Findings, resolver: tuple[NameServer, bool]) -> None:
    server, is_default = resolver
    if not is_default:
        found.warn(
            f"{server} of {config.resolv_conf} is a resolver on this host that is not running now: make sure that "
            "the excluded uids are its own, or its queries will loop"
        )
    elif not _excludes_dns_of(policy, None):
        found.warn(
            f"{config.resolv_conf} names no name server: programs of this host ask {server} (resolv.conf(5)), where "
            "nothing listens now. A resolver that is started there would have its own queries redirected, and loop, "
            f"without {_exclusion(policy, None)}"
        )


def _owner_uid(owner: Listener, host: Host) -> int:
    """The uid a resolver asks its upstream servers as: what its process is now, not what it was when it bound 53."""
    uid = host.process_uid(owner)
    return owner.uid if uid is None else uid


def _excludes_dns_of(policy: Policy, uid: int | None) -> bool:
    """Whether the DNS queries of a user are left alone, over TCP too where that is captured; with None, of any user."""
    captured = (Protocol.UDP, *([Protocol.TCP] if policy.dns.tcp else []))
    return all(
        any(
            rule.protocol is protocol and includes(rule.ports, DNS_PORT) and (uid is None or uid in rule.uids)
            for rule in policy.outbound.exclude_uids
        )
        for protocol in captured
    )


def _exclusion(policy: Policy, uid: int | None) -> str:
    """The flag that leaves a resolver's own queries alone."""
    whose = "UID, with the uid that resolver runs as" if uid is None else f"{uid}, the user it runs as"
    return f"--exclude-outbound-ports-for-uids {'' if policy.dns.tcp else 'udp:'}{DNS_PORT}:{whose}"

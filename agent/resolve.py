"""From a configuration and the host's facts to a policy: users become uids, name servers are read, families decided.

Nothing is changed, and every problem is reported in one go.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from agent.config import Config
from agent.config_values import EXECUTABLES
from agent.engine_options import EngineOptions
from agent.errors import HostError, InputError
from agent.host.facts import Host
from agent.host.resolvers import parse_name_servers
from agent.host.sockets import Listener
from agent.host.users import DEFAULT_PROXY_NAME, DEFAULT_PROXY_UID
from agent.policy import (
    DNS_PORT,
    Cgroup,
    Dns,
    DnsCapture,
    Family,
    Inbound,
    NameServer,
    Outbound,
    Policy,
    Protocol,
    Redirection,
    WhenProxyDown,
    includes,
    is_scoped,
)
from agent.ssh_guard import SSH_PORT, guard

DOCKER_RESOLVER = IPv4Address("127.0.0.11")
"""Docker's embedded DNS server: it asks upstream from outside the container, so nothing can loop."""

_ROOT_IS_PROXY = (
    "the data plane runs as root: no connection of any process of root will be redirected, and none will be "
    "protected by the data plane's policies; give it a user of its own"
)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What is to be done, and what the operator should know about it."""

    policy: Policy
    options: EngineOptions
    notices: tuple[str, ...] = ()
    """Those that begin with "warning: " need attention."""


@dataclass(slots=True)
class _Findings:
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        self.notices.append(f"warning: {text}")


def resolve(config: Config, host: Host) -> Resolved:
    """The policy and engine options of a configuration on this host. Raises InputError with every problem."""
    found = _Findings(notices=list(config.notices))
    proxy_uid = _proxy_uid(config, host, found)
    families = _families(config, host, found)
    loopback = host.loopback()
    if loopback is None:
        found.problems.append("this network namespace has no loopback interface")
    policy = Policy(
        proxy_uid=proxy_uid,
        families=families,
        loopback=loopback or "lo",
        inbound=_inbound(config, found),
        outbound=_outbound(config),
        dns=_dns(config, host, found, families),
        virtual_networks=config.virtual_networks,
        drop_invalid=config.drop_invalid,
        log_level=config.log_level if config.log_enabled else None,
        when_proxy_down=WhenProxyDown(config.when_proxy_down),
        cgroup=_cgroup(config, host, found),
    )
    if policy.dns.capture is DnsCapture.ALL:
        _refuse_resolver_loop(config, policy, host, found)
    policy = _with_ssh_guard(policy, config, host, found)
    if config.firewalld_reload and not config.store_firewalld:
        found.warn(f"{config.origin('firewalld_reload')} has no effect without --store-firewalld")
    options = engine_options(config)
    _see_to_ebpf(config, options, found)
    if options.engine in ("nftables", "ebpf") and options.iptables_because:
        found.problems.append(f"{config.origin('engine')}: {options.engine}, but {options.iptables_because}; drop one")
    if policy.when_proxy_down is WhenProxyDown.BYPASS and options.engine != "ebpf":
        found.problems.append(
            f"{config.origin('when_proxy_down')}: bypass, but rules of nftables and iptables cannot see whether "
            "anything listens; add --engine ebpf"
        )
    if policy.inbound.mode is Redirection.TPROXY and not policy.inbound.enabled:
        found.warn(f"{config.origin('inbound_mode')} has no effect, because nothing that arrives is redirected")
    if found.problems:
        raise InputError(found.problems)
    return Resolved(policy, options, tuple(dict.fromkeys(found.notices)))


def engine_options(config: Config) -> EngineOptions:
    """The engine's part of a configuration. Programs of a family that is not given completely are left out."""
    given = config.executables
    complete = {
        name: given[name]
        for tool in ("iptables", "ip6tables")
        for name in EXECUTABLES
        if name.startswith(tool) and all(other in given for other in EXECUTABLES if other.startswith(tool))
    }
    return EngineOptions(
        engine="ebpf" if config.ebpf_enabled and config.engine == "auto" else config.engine,
        iptables_because=_iptables_because(config),
        iptables_mode=config.iptables_mode,
        executables=complete,
        comments=not config.comments_disabled,
        ebpf_cgroup=config.ebpf_cgroup,
        ebpf_bpffs=config.ebpf_bpffs,
        wait_seconds=config.wait,
        wait_interval_microseconds=config.wait_interval,
        max_retries=config.max_retries,
        sleep_between_retries_seconds=config.sleep_between_retries,
        verbose=config.verbose,
        store_firewalld=config.store_firewalld,
        reload_firewalld=config.firewalld_reload,
    )


_WITHOUT_EFFECT = {
    "ebpf_instance_ip": "the programs look this host's addresses up in the kernel",
    "ebpf_programs_source_path": "tpctl brings its programs along",
    "ebpf_tc_attach_iface": "the programs are attached to no interface",
}
"""Of kumactl's eBPF engine, by option: why tpctl's has no use for it."""


def _see_to_ebpf(config: Config, options: EngineOptions, found: _Findings) -> None:
    """What the options of the eBPF engine come to, beside one another and beside --engine."""
    if config.ebpf_enabled and options.engine != "ebpf":
        found.problems.append(f"{config.origin('ebpf_enabled')} contradicts {config.origin('engine')}; drop one")
    for name, reason in _WITHOUT_EFFECT.items():
        if getattr(config, name):
            found.notices.append(f"{config.origin(name)} has no effect: {reason}")
    for name in ("ebpf_cgroup", "ebpf_bpffs"):
        value = getattr(config, name)
        if value and options.engine != "ebpf":
            found.warn(f"{config.origin(name)} has no effect without --engine ebpf")
        elif value and not value.startswith("/"):
            found.problems.append(f'{config.origin(name)}: "{value}" is no absolute path')


def _iptables_because(config: Config) -> str | None:
    """What in the configuration only the iptables engine carries out, or takes for granted."""
    given = [
        name
        for name in ("iptables_mode", "executables", "log_enabled", "store_firewalld")
        if config.is_given(name) and getattr(config, name) not in (False, "auto", {})
    ]
    return f"{config.origin(given[0])} asks for iptables" if given else None


def _cgroup(config: Config, host: Host, found: _Findings) -> Cgroup | None:
    if not config.cgroup:
        return None
    try:
        return host.cgroup(config.cgroup)
    except HostError as error:
        found.problems.append(f"{config.origin('cgroup')}: {error}")
        return None


def _inbound(config: Config, found: _Findings) -> Inbound:
    return Inbound(
        enabled=config.inbound_enabled and _is_inbound_meant(config, found),
        port=config.inbound_port,
        include_ports=config.inbound_include_ports,
        exclude_ports=config.inbound_exclude_ports,
        exclude_sources=config.inbound_exclude_sources,
        insert=config.inbound_insert,
        mode=Redirection(config.inbound_mode),
    )


def _is_inbound_meant(config: Config, found: _Findings) -> bool:
    """Packets that arrive are not yet anybody's: beside --cgroup the service's ports have to be named."""
    if not config.cgroup or config.inbound_include_ports:
        return True
    name_them = "name the ports on which its processes serve with --include-inbound-ports"
    for name in ("inbound_enabled", "inbound_exclude_ports"):
        if config.is_given(name) and getattr(config, name):
            found.problems.append(
                f"{config.origin(name)} would redirect what arrives for other services than those of "
                f"{config.origin('cgroup')}; {name_them} instead"
            )
    found.notices.append(f"nothing that arrives is redirected beside {config.origin('cgroup')}; {name_them}")
    return False


def _outbound(config: Config) -> Outbound:
    return Outbound(
        enabled=config.outbound_enabled,
        port=config.outbound_port,
        include_ports=config.outbound_include_ports,
        exclude_ports=config.outbound_exclude_ports,
        exclude_destinations=config.outbound_exclude_destinations,
        exclude_uids=config.outbound_exclude_uids,
        insert=config.outbound_insert,
    )


def _proxy_uid(config: Config, host: Host, found: _Findings) -> int:
    """The data plane's uid; when it cannot be told, a problem is recorded and the default comes back."""
    create = f"create it (useradd --system --no-create-home {config.proxy_user or DEFAULT_PROXY_NAME})"
    if config.proxy_user:
        uid = host.uid_of(config.proxy_user)
        if uid is None:
            found.problems.append(
                f'{config.origin("proxy_user")}: there is no user "{config.proxy_user}" on this host; '
                f"{'give the uid or name of one that exists' if config.proxy_user.isdigit() else create}"
            )
            return DEFAULT_PROXY_UID
    else:
        tried = (host.uid_of(user) for user in (str(DEFAULT_PROXY_UID), DEFAULT_PROXY_NAME))
        uid = next((one for one in tried if one is not None), None)
        if uid is None:
            found.problems.append(
                f"flag --kuma-dp-user: not given, and this host has neither uid {DEFAULT_PROXY_UID} nor a user "
                f'"{DEFAULT_PROXY_NAME}"; name the user the data plane runs as, or {create}'
            )
            return DEFAULT_PROXY_UID
    if uid == 0:
        found.warn(f"{config.origin('proxy_user')}: {_ROOT_IS_PROXY}")
    return uid


def _families(config: Config, host: Host, found: _Findings) -> frozenset[Family]:
    if config.ip_family_mode == "ipv4":
        if host.has_ipv6():
            found.notices.append(
                f"{config.origin('ip_family_mode')} is ipv4: IPv6 is left alone and goes past the data plane"
            )
    elif host.has_ipv6():
        return frozenset(Family)
    else:
        found.notices.append("IPv6 is left alone, because no interface but loopback has an IPv6 address")
    for vnet in config.virtual_networks:
        if Family.of(vnet.network) is Family.IPV6:
            found.warn(f"{config.origin('virtual_networks')}: {vnet} has no effect, because IPv6 is left alone")
    return frozenset({Family.IPV4})


def _dns(config: Config, host: Host, found: _Findings, families: frozenset[Family]) -> Dns:
    capture, servers = DnsCapture.OFF, tuple[NameServer, ...]()
    if config.dns_capture_all:
        capture = DnsCapture.ALL
    elif config.dns_enabled:
        capture = DnsCapture.LISTED
        servers = _listed_servers(config, host, found, families)
    return Dns(
        capture=capture,
        port=config.dns_port,
        servers=servers,
        tcp=config.dns_tcp,
        split_zones=not config.dns_skip_zone_split,
    )


def _listed_servers(
    config: Config, host: Host, found: _Findings, families: frozenset[Family]
) -> tuple[NameServer, ...]:
    try:
        servers = parse_name_servers(host.resolv_conf(config.resolv_conf))
    except HostError as error:
        found.problems.append(f"{config.origin('resolv_conf')}: {error}")
        return ()
    if not servers:
        found.problems.append(
            f"{config.origin('dns_enabled')}: {config.resolv_conf} lists no name server, so nothing can be redirected; "
            "add one, or use --redirect-all-dns-traffic"
        )
        return ()
    for server in servers:
        if is_scoped(server.address):
            found.warn(
                f"{config.resolv_conf}: DNS queries to {server} are not redirected, the kernel cannot redirect "
                "link-local destinations; name a server with a global address"
            )
    for family in sorted(families):
        if not any(Family.of(server.address) is family for server in servers):
            found.warn(f"{config.resolv_conf} lists no IPv{family} name server: DNS over IPv{family} is not redirected")
    return servers


def _refuse_resolver_loop(config: Config, policy: Policy, host: Host, found: _Findings) -> None:
    """A resolver on this host asks its upstream servers; if those queries are captured too, they come back to it."""
    try:
        servers = parse_name_servers(host.resolv_conf(config.resolv_conf))
    except HostError:
        return  # what is not there names no local resolver
    sockets = [one for one in host.listeners(Protocol.UDP) if one.port == DNS_PORT]
    for server in servers:
        if server.address == DOCKER_RESOLVER or not host.is_local(server.address):
            continue
        owner = next((one for one in sockets if one.takes(server.address)), None)
        if owner and policy.cgroup and not policy.cgroup.holds(host.process_cgroup(owner)):
            continue
        uid = None if owner is None else _owner_uid(owner, host)
        if uid is not None and (uid == policy.proxy_uid or _excludes_dns_of(policy, uid)):
            continue
        if uid is None and _excludes_dns_of(policy, None):
            found.warn(
                f"{server} of {config.resolv_conf} is a resolver on this host that does not run now: make sure that "
                "the excluded uids are its own, or its queries will loop"
            )
            continue
        found.problems.append(_loop_message(config, server, uid))


def _owner_uid(owner: Listener, host: Host) -> int:
    """The uid a resolver asks its upstream servers as: what its process is now, not what it was when it bound 53."""
    uid = host.process_uid(owner)
    return owner.uid if uid is None else uid


def _excludes_dns_of(policy: Policy, uid: int | None) -> bool:
    """Whether the DNS queries of a user are left alone; with None, those of any user."""
    return any(
        rule.protocol is Protocol.UDP and includes(rule.ports, DNS_PORT) and (uid is None or uid in rule.uids)
        for rule in policy.outbound.exclude_uids
    )


def _loop_message(config: Config, server: NameServer, uid: int | None) -> str:
    whose = "UID, with the uid that resolver runs as" if uid is None else f"{uid}, the user it runs as"
    return (
        f"{config.origin('dns_capture_all')}: {config.resolv_conf} names {server}, a resolver on this host; its own "
        "queries would be redirected too and loop for ever: use --redirect-dns instead, or add "
        f"--exclude-outbound-ports-for-uids udp:53:{whose}"
    )


def _with_ssh_guard(policy: Policy, config: Config, host: Host, found: _Findings) -> Policy:
    """The policy that leaves the caller's ssh session alone, unless that was declined."""
    listening = {
        one.port for one in host.listeners(Protocol.TCP) if one.port == SSH_PORT and not one.address.is_loopback
    }
    guarded = guard(policy.inbound, host.ssh_session_port(), listening, enabled=config.ssh_guard)
    found.notices.extend(guarded.notices)
    found.problems.extend(guarded.problems)
    return dataclasses.replace(policy, inbound=guarded.inbound)

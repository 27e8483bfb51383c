"""From a configuration and the host's facts to a policy: users become uids, name servers are read, families decided.

Nothing is changed, and every problem is reported in one go.
"""

from __future__ import annotations

import dataclasses
import os
from typing import NamedTuple

from tpctl.config import name_servers
from tpctl.config.effective import Config
from tpctl.config.findings import Findings
from tpctl.config.values import EXECUTABLES
from tpctl.host.facts import Host
from tpctl.host.users import DEFAULT_PROXY_NAME, DEFAULT_PROXY_UID
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.exclusions import Mark
from tpctl.spec.policy import (
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
)
from tpctl.spec.ssh_guard import SSH_PORT, guard
from tpctl.system.errors import HostError, InputError

_ROOT_IS_PROXY = (
    "the data plane runs as root: no connection of root's processes will be redirected, nor be "
    "protected by the data plane's policies; give it a user of its own"
)


class Resolved(NamedTuple):
    """What is to be done, and what the operator should know about it."""

    policy: Policy
    options: EngineOptions
    notices: tuple[str, ...] = ()
    """Those that begin with "warning: " need attention."""


def resolve(config: Config, host: Host) -> Resolved:
    """The policy and engine options of a configuration on this host. Raises InputError with every problem."""
    found = Findings(notices=list(config.notices))
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
        outbound=_outbound(config, host, found),
        dns=_dns(config, host, found, families),
        virtual_networks=config.virtual_networks,
        exclude_interfaces=config.exclude_interfaces,
        drop_invalid=config.drop_invalid,
        guard_ports=config.guard_ports,
        log_level=config.log_level if config.log_enabled else None,
        when_proxy_down=WhenProxyDown(config.when_proxy_down),
        cgroup=_cgroup(config, host, found),
    )
    for excluded in config.exclude_interfaces:
        if policy.loopback in excluded:
            found.problems.append(
                f"{config.origin('exclude_interfaces')}: {excluded} is or includes {policy.loopback}, over which "
                "redirected connections reach the data plane; name the others"
            )
    name_servers.see_to_loops(config, policy, host, found)
    policy = _with_ssh_guard(policy, config, host, found)
    if config.firewalld_reload and not config.store_firewalld:
        found.warn(f"{config.origin('firewalld_reload')} has no effect without --store-firewalld")
    options = engine_options(config)
    _see_to_ebpf(config, options, found)
    if options.engine in ("nftables", "ebpf") and options.iptables_because:
        found.problems.append(f"{config.origin('engine')}: {options.engine}, but {options.iptables_because}; drop one")
    if policy.when_proxy_down is WhenProxyDown.BYPASS and options.engine != "ebpf":
        found.problems.append(
            f"{config.origin('when_proxy_down')}: bypass, but nftables and iptables rules cannot see whether "
            "anything listens; add --engine ebpf"
        )
    if policy.inbound.mode is Redirection.TPROXY and not policy.inbound.enabled:
        found.warn(f"{config.origin('inbound_mode')} has no effect, because inbound redirection is off")
    if found.problems:
        raise InputError(found.problems)
    return Resolved(policy, options, tuple(dict.fromkeys(found.notices)))


def engine_options(config: Config) -> EngineOptions:
    """The engine's part of a configuration. Programs of a family that is not given completely are left out.

    Paths become absolute: they go on record, and later commands may run elsewhere.
    """
    given = config.executables
    complete = {
        # Links stay: by which name it was called tells such a program what to do.
        name: os.path.abspath(given[name]) if "/" in given[name] else given[name]  # noqa: PTH100
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
    "ebpf_instance_ip": "the programs look up this host's addresses in the kernel",
    "ebpf_programs_source_path": "tpctl comes with its programs",
    "ebpf_tc_attach_iface": "the programs are not attached to interfaces",
}
"""Of kumactl's eBPF engine, by option: why tpctl's has no use for it."""


def _see_to_ebpf(config: Config, options: EngineOptions, found: Findings) -> None:
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


def _cgroup(config: Config, host: Host, found: Findings) -> Cgroup | None:
    if not config.cgroup:
        return None
    try:
        return host.cgroup(config.cgroup)
    except HostError as error:
        found.problems.append(f"{config.origin('cgroup')}: {error}")
        return None


def _inbound(config: Config, found: Findings) -> Inbound:
    return Inbound(
        enabled=config.inbound_enabled and _is_inbound_meant(config, found),
        port=config.inbound_port,
        include_ports=config.inbound_include_ports,
        exclude_ports=config.inbound_exclude_ports,
        exclude_sources=config.inbound_exclude_sources,
        insert=config.inbound_insert,
        mode=Redirection(config.inbound_mode),
    )


def _is_inbound_meant(config: Config, found: Findings) -> bool:
    """Packets that arrive are not yet anybody's: beside --cgroup the service's ports have to be named."""
    if not config.cgroup or config.inbound_include_ports:
        return True
    name_them = "name the ports on which its processes serve with --include-inbound-ports"
    for name in ("inbound_enabled", "inbound_exclude_ports"):
        if config.is_given(name) and getattr(config, name):
            found.problems.append(
                f"{config.origin(name)} would redirect inbound connections to services other than those of "
                f"{config.origin('cgroup')}; {name_them} instead"
            )
    found.notices.append(f"with {config.origin('cgroup')}, nothing inbound is redirected; {name_them}")
    return False


def _excluded_marks(config: Config, host: Host, found: Findings) -> tuple[Mark, ...]:
    """Those of the configuration, or those that would otherwise take a VPN client off the network, with a warning."""
    given = config.outbound_exclude_marks
    kept_out = host.marks_kept_out_of_tunnels()
    told = "warning: this host routes connections with the mark {} apart, as VPN clients do for their own transport: "
    if isinstance(given, str):
        for mark in kept_out:
            found.notices.append(
                told.format(mark) + "they are not redirected; --exclude-outbound-marks none redirects them"
            )
        return kept_out
    for mark in kept_out:
        if mark not in given and config.outbound_enabled:
            found.notices.append(
                told.format(mark) + f"the data plane's connections have no mark, and {mark} is not excluded"
            )
    return given


def _outbound(config: Config, host: Host, found: Findings) -> Outbound:
    return Outbound(
        enabled=config.outbound_enabled,
        port=config.outbound_port,
        include_ports=config.outbound_include_ports,
        exclude_ports=config.outbound_exclude_ports,
        exclude_destinations=config.outbound_exclude_destinations,
        exclude_uids=config.outbound_exclude_uids,
        exclude_marks=_excluded_marks(config, host, found),
        insert=config.outbound_insert,
    )


def _proxy_uid(config: Config, host: Host, found: Findings) -> int:
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


def _families(config: Config, host: Host, found: Findings) -> frozenset[Family]:
    if config.ip_family_mode == "ipv4":
        if host.has_ipv6():
            found.notices.append(
                f"{config.origin('ip_family_mode')} is ipv4: IPv6 is left alone and bypasses the data plane"
            )
    elif host.speaks_ipv6():
        return frozenset(Family)  # whether or not there is an address today
    elif host.has_ipv6():
        name = host.loopback()
        found.problems.append(
            f"IPv6 is turned off for {name}, where redirected connections end, but not for others: "
            f"turn it on (sysctl -w net.ipv6.conf.{name}.disable_ipv6=0), or leave IPv6 alone (--ip-family-mode ipv4)"
        )
    else:
        found.notices.append("IPv6 is left alone: it is turned off on this host; tpctl status shows when that changes")
    for vnet in config.virtual_networks:
        if Family.of(vnet.network) is Family.IPV6:
            found.warn(f"{config.origin('virtual_networks')}: {vnet} has no effect, because IPv6 is left alone")
    return frozenset({Family.IPV4})


def _dns(config: Config, host: Host, found: Findings, families: frozenset[Family]) -> Dns:
    capture, servers = DnsCapture.OFF, tuple[NameServer, ...]()
    if config.dns_capture_all:
        capture = DnsCapture.ALL
    elif config.dns_enabled:
        capture = DnsCapture.LISTED
        servers = name_servers.listed(config, host, found, families)
    return Dns(
        capture=capture,
        port=config.dns_port,
        servers=servers,
        tcp=config.dns_tcp,
        split_zones=not config.dns_skip_zone_split,
    )


def _with_ssh_guard(policy: Policy, config: Config, host: Host, found: Findings) -> Policy:
    """The policy that leaves the caller's ssh session alone, unless that was declined."""
    listening = {
        one.port for one in host.listeners(Protocol.TCP) if one.port == SSH_PORT and not one.address.is_loopback
    }
    guarded = guard(policy.inbound, host.ssh_session_port(), listening, enabled=config.ssh_guard)
    found.notices.extend(guarded.notices)
    found.problems.extend(guarded.problems)
    return dataclasses.replace(policy, inbound=guarded.inbound)

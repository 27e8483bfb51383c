"""Every input of a policy, in one table: its YAML key, flag, variable, meaning and default.

The YAML reader, the reader of the environment, the command line and the documentation are all made from `OPTIONS`.
Keys, flags and variables are kumactl's, except the rows that say otherwise.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from tpctl.config.traffic import (
    AUTO,
    read_interfaces,
    read_marks,
    read_networks,
    read_ports,
    read_uid_exclusions,
    read_virtual_networks,
)
from tpctl.config.values import (
    Choice,
    Number,
    Reader,
    read_bool,
    read_cgroup,
    read_duration,
    read_executables,
    read_path,
    read_port,
    read_text,
    read_user,
    read_variables,
)
from tpctl.spec.policy import DEFAULT_DNS_PORT, DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT

MAX_UNSIGNED = 2**32 - 1


class Section(enum.StrEnum):
    """The heading of --help under which an option stands."""

    DATA_PLANE = "Data plane"
    INBOUND = "Inbound"
    OUTBOUND = "Outbound"
    DNS = "DNS"
    VIRTUAL_NETWORKS = "Interfaces and virtual networks"
    PACKETS = "Packets and logging"
    ENGINE = "Engine"
    RUN = "This run"


class Option(NamedTuple):
    """One input."""

    name: str
    """The attribute of `tpctl.config.load.Config` that holds it."""
    section: Section
    key: str
    """The path in kumactl's YAML, with dots."""
    flag: str
    variable: str
    """The environment variable without its prefix."""
    read: Reader
    default: object
    metavar: str
    """What --help shows for the value; empty for a truth value."""
    help: str
    accumulates: bool = False
    """Whether repeating the flag adds to the list (kumactl's port lists do not: the last one wins)."""
    new: bool = False
    """tpctl has this input and kumactl has not, in any form."""
    flag_negates: bool = False
    """The flag says the opposite of the key and the variable (`--no-x` sets `x: false`)."""

    @property
    def is_bool(self) -> bool:
        """Whether the flag may stand alone."""
        return self.read is read_bool


_PORTS = "PORTS"
_CIDRS = "CIDRS"

OPTIONS: tuple[Option, ...] = (
    Option(
        "proxy_user", Section.DATA_PLANE, "kumaDPUser", "--kuma-dp-user", "KUMA_DP_USER", read_user, "", "USER",
        "User (name or uid) the data plane runs as; its own connections are not redirected. "
        "Default: uid 5678, else the user kuma-dp.",
    ),
    Option(
        "ip_family_mode", Section.DATA_PLANE, "ipFamilyMode", "--ip-family-mode", "IP_FAMILY_MODE",
        Choice("dualstack", "ipv4"), "dualstack", "MODE",
        "dualstack redirects IPv4 and IPv6, ipv4 leaves IPv6 alone.",
    ),
    Option(
        "dataplane_file", Section.DATA_PLANE, "dataplaneFile", "--dataplane-file", "DATAPLANE_FILE", read_text, "",
        "FILE",
        "Kuma's Dataplane resource, as given to kuma-dp: redirect to its ports, and inbound only the ports in "
        "networking.inbound.",
        new=True,
    ),
    Option(
        "dataplane_variables", Section.DATA_PLANE, "dataplaneVar", "--dataplane-var", "DATAPLANE_VAR", read_variables,
        {}, "NAME=VALUE,...",
        "Values of the variables in that file, {{ NAME }}. Repeatable.", accumulates=True, new=True,
    ),
    Option(
        "inbound_enabled", Section.INBOUND, "redirect.inbound.enabled", "--redirect-inbound",
        "REDIRECT_INBOUND_ENABLED", read_bool, True, "",
        "Redirect inbound connections; =false for a gateway.",
    ),
    Option(
        "inbound_port", Section.INBOUND, "redirect.inbound.port", "--redirect-inbound-port", "REDIRECT_INBOUND_PORT",
        read_port, DEFAULT_INBOUND_PORT, "PORT",
        "Port where the data plane accepts inbound connections.",
    ),
    Option(
        "inbound_exclude_ports", Section.INBOUND, "redirect.inbound.excludePorts", "--exclude-inbound-ports",
        "REDIRECT_INBOUND_EXCLUDE_PORTS", read_ports, (), _PORTS,
        "Leave inbound connections to these ports alone: 22,8000-8100. Repeated: the last one wins.",
    ),
    Option(
        "inbound_include_ports", Section.INBOUND, "redirect.inbound.includePorts", "--include-inbound-ports",
        "REDIRECT_INBOUND_INCLUDE_PORTS", read_ports, (), _PORTS,
        "Redirect only these ports; excluded ports then have no effect.",
    ),
    Option(
        "inbound_exclude_sources", Section.INBOUND, "redirect.inbound.excludePortsForIPs", "--exclude-inbound-ips",
        "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_IPS", read_networks, (), _CIDRS,
        "Leave inbound connections from these addresses alone. Repeatable.", accumulates=True,
    ),
    Option(
        "inbound_insert", Section.INBOUND, "redirect.inbound.insertRedirectInsteadOfAppend",
        "--redirect-inbound-insert-instead-of-append", "REDIRECT_INBOUND_INSERT_REDIRECT_INSTEAD_OF_APPEND",
        read_bool, False, "",
        "Insert the rules before those of other software.",
    ),
    Option(
        "inbound_mode", Section.INBOUND, "redirect.inbound.mode", "--inbound-mode", "REDIRECT_INBOUND_MODE",
        Choice("redirect", "tproxy"), "redirect", "MODE",
        "redirect rewrites the destination of inbound connections; tproxy keeps it, so that the data plane can dial "
        "the application from the client's own address. The listener must then be transparent.",
        new=True,
    ),
    Option(
        "ssh_guard", Section.INBOUND, "sshGuard", "--no-ssh-guard", "SSH_GUARD", read_bool, True, "",
        "Redirect the port of this ssh session too; without this flag it is left alone.",
        new=True, flag_negates=True,
    ),
    Option(
        "guard_ports", Section.INBOUND, "guardPorts", "--no-guard-ports", "GUARD_PORTS", read_bool, True, "",
        "Let through connections that were opened to the data plane's own ports; without this flag they are reset.",
        new=True, flag_negates=True,
    ),
    Option(
        "outbound_enabled", Section.OUTBOUND, "redirect.outbound.enabled", "--redirect-outbound",
        "REDIRECT_OUTBOUND_ENABLED", read_bool, True, "",
        "Redirect outbound connections.",
    ),
    Option(
        "outbound_port", Section.OUTBOUND, "redirect.outbound.port", "--redirect-outbound-port",
        "REDIRECT_OUTBOUND_PORT", read_port, DEFAULT_OUTBOUND_PORT, "PORT",
        "Port where the data plane accepts outbound connections.",
    ),
    Option(
        "outbound_exclude_ports", Section.OUTBOUND, "redirect.outbound.excludePorts", "--exclude-outbound-ports",
        "REDIRECT_OUTBOUND_EXCLUDE_PORTS", read_ports, (), _PORTS,
        "Leave outbound TCP connections to these ports alone. Repeated: the last one wins.",
    ),
    Option(
        "outbound_include_ports", Section.OUTBOUND, "redirect.outbound.includePorts", "--include-outbound-ports",
        "REDIRECT_OUTBOUND_INCLUDE_PORTS", read_ports, (), _PORTS,
        "Redirect only these ports; excluded ports then have no effect.",
    ),
    Option(
        "outbound_exclude_destinations", Section.OUTBOUND, "redirect.outbound.excludePortsForIPs",
        "--exclude-outbound-ips", "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_IPS", read_networks, (), _CIDRS,
        "Leave everything to these addresses alone, DNS too. Repeatable.", accumulates=True,
    ),
    Option(
        "outbound_exclude_uids", Section.OUTBOUND, "redirect.outbound.excludePortsForUIDs",
        "--exclude-outbound-ports-for-uids", "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS", read_uid_exclusions, (),
        "[PROTO:][PORTS:]UIDS",
        "Leave these users' connections to these ports alone: udp:53:101, tcp:22,80-90:1000-1999, 1000. Repeatable.",
        accumulates=True,
    ),
    Option(
        "outbound_exclude_marks", Section.OUTBOUND, "redirect.outbound.excludeMarks", "--exclude-outbound-marks",
        "REDIRECT_OUTBOUND_EXCLUDE_MARKS", read_marks, AUTO, "MARK[/MASK]",
        "Leave alone connections and DNS queries of sockets with such a mark (SO_MARK), as VPN clients set on their "
        "own: 0x80000/0xff0000, 51820. auto takes those that ip-rule(8) keeps out of a tunnel on this host; none "
        "excludes nothing. Repeatable.", accumulates=True, new=True,
    ),
    Option(
        "outbound_insert", Section.OUTBOUND, "redirect.outbound.insertRedirectInsteadOfAppend",
        "--redirect-outbound-insert-instead-of-append", "REDIRECT_OUTBOUND_INSERT_REDIRECT_INSTEAD_OF_APPEND",
        read_bool, False, "",
        "Insert the rules before those of other software.",
    ),
    Option(
        "cgroup", Section.OUTBOUND, "redirect.outbound.cgroup", "--cgroup", "REDIRECT_OUTBOUND_CGROUP", read_cgroup, "",
        "CGROUP",
        "Redirect only connections and DNS queries of one control group's processes: system.slice/app.service. "
        "Inbound connections are then redirected only for --include-inbound-ports.", new=True,
    ),
    Option(
        "dns_enabled", Section.DNS, "redirect.dns.enabled", "--redirect-dns", "REDIRECT_DNS_ENABLED",
        read_bool, False, "",
        "Redirect DNS queries to the name servers of resolv.conf.",
    ),
    Option(
        "dns_capture_all", Section.DNS, "redirect.dns.captureAll", "--redirect-all-dns-traffic",
        "REDIRECT_DNS_CAPTURE_ALL", read_bool, False, "",
        "Redirect DNS queries to every server.",
    ),
    Option(
        "dns_port", Section.DNS, "redirect.dns.port", "--redirect-dns-port", "REDIRECT_DNS_PORT",
        read_port, DEFAULT_DNS_PORT, "PORT",
        "Port where the data plane accepts DNS queries.",
    ),
    Option(
        "dns_tcp", Section.DNS, "redirect.dns.tcp", "--redirect-dns-tcp", "REDIRECT_DNS_TCP", read_bool, False, "",
        "Redirect DNS over TCP too; otherwise it passes. Recommended with kuma-dp 3, which serves both; older versions "
        "serve UDP only.", new=True,
    ),
    Option(
        "resolv_conf", Section.DNS, "redirect.dns.resolvConfigPath", "--resolv-conf",
        "REDIRECT_DNS_RESOLV_CONFIG_PATH", read_path, "/etc/resolv.conf", "FILE",
        "File that lists the name servers.",
    ),
    Option(
        "dns_skip_zone_split", Section.DNS, "redirect.dns.skipConntrackZoneSplit", "--skip-dns-conntrack-zone-split",
        "REDIRECT_DNS_SKIP_CONNTRACK_ZONE_SPLIT", read_bool, False, "",
        "Keep all DNS in one conntrack zone.",
    ),
    Option(
        "virtual_networks", Section.VIRTUAL_NETWORKS, "redirect.vnet.networks", "--vnet", "REDIRECT_VNET_NETWORKS",
        read_virtual_networks, (), "INTERFACE[+]:CIDR",
        "Treat what leaves this bridge's network as outbound traffic of this host, and redirect its DNS queries: "
        "docker0:172.17.0.0/16, br+:fd00::/64. Repeatable.",
        accumulates=True,
    ),
    Option(
        "exclude_interfaces", Section.VIRTUAL_NETWORKS, "redirect.excludeInterfaces", "--exclude-interfaces",
        "REDIRECT_EXCLUDE_INTERFACES", read_interfaces, (), "INTERFACE[+],...",
        "Leave alone everything that arrives or leaves by these interfaces: tun0, wg+ for all whose name begins with "
        "wg. Not with --engine ebpf. Repeatable.", accumulates=True, new=True,
    ),
    Option(
        "drop_invalid", Section.PACKETS, "dropInvalidPackets", "--drop-invalid-packets", "DROP_INVALID_PACKETS",
        read_bool, False, "",
        "Drop packets that conntrack calls invalid, on the whole host.",
    ),
    Option(
        "log_enabled", Section.PACKETS, "log.enabled", "--iptables-logs", "LOG_ENABLED", read_bool, False, "",
        "Write a kernel log line for every new connection.",
    ),
    Option(
        "log_level", Section.PACKETS, "log.level", "--log-level", "LOG_LEVEL", Number(0, 7), 7, "0-7",
        "Level of these lines, as in syslog(2).",
    ),
    Option(
        "engine", Section.ENGINE, "engine", "--engine", "ENGINE",
        Choice("auto", "nftables", "iptables", "ebpf"), "auto", "ENGINE",
        "auto, nftables, iptables or ebpf. auto chooses nftables where it works and no --iptables-... flag is given.",
        new=True,
    ),
    Option(
        "when_proxy_down", Section.ENGINE, "whenProxyDown", "--when-proxy-down", "WHEN_PROXY_DOWN",
        Choice("block", "bypass"), "block", "block|bypass",
        "While the data plane is not listening, refuse what would be redirected, or let it pass; bypass needs "
        "--engine ebpf.",
        new=True,
    ),
    Option(
        "ebpf_enabled", Section.ENGINE, "ebpf.enabled", "--ebpf-enabled", "EBPF_ENABLED", read_bool, False, "",
        "The same as --engine ebpf.",
    ),
    Option(
        "ebpf_cgroup", Section.ENGINE, "ebpf.cgroupPath", "--ebpf-cgroup-path", "EBPF_CGROUP_PATH", read_text, "",
        "DIR",
        "Directory of control groups to attach the eBPF programs to. Default: the root of the hierarchy.",
    ),
    Option(
        "ebpf_bpffs", Section.ENGINE, "ebpf.bpffsPath", "--ebpf-bpffs-path", "EBPF_BPFFS_PATH", read_text, "", "DIR",
        "BPF file system in which to keep the eBPF programs; mounted there if necessary. Default: /sys/fs/bpf.",
    ),
    Option(
        "ebpf_instance_ip", Section.ENGINE, "ebpf.instanceIP", "--ebpf-instance-ip", "EBPF_INSTANCE_IP", read_text, "",
        "ADDRESS",
        "No effect: tpctl's eBPF programs look up this host's addresses in the kernel.",
    ),
    Option(
        "ebpf_programs_source_path", Section.ENGINE, "ebpf.programsSourcePath", "--ebpf-programs-source-path",
        "EBPF_PROGRAMS_SOURCE_PATH", read_text, "", "DIR",
        "No effect: tpctl comes with its eBPF programs, and compiles them for the running kernel.",
    ),
    Option(
        "ebpf_tc_attach_iface", Section.ENGINE, "ebpf.tcAttachIface", "--ebpf-tc-attach-iface", "EBPF_TC_ATTACH_IFACE",
        read_text, "", "INTERFACE",
        "No effect: tpctl's eBPF programs are not attached to interfaces; they see connections on all of them.",
    ),
    Option(
        "experimental_engine", Section.ENGINE, "experimentalTransparentProxyEngine",
        "--experimental-transparent-proxy-engine", "EXPERIMENTAL_TRANSPARENT_PROXY_ENGINE", read_bool, False, "",
        "No effect: tpctl has no experimental engine.",
    ),
    Option(
        "iptables_mode", Section.ENGINE, "iptablesMode", "--iptables-mode", "IPTABLES_MODE",
        Choice("auto", "nft", "legacy"), "auto", "MODE",
        "auto (like the host's own iptables command), nft or legacy.", new=True,
    ),
    Option(
        "executables", Section.ENGINE, "iptablesExecutables", "--iptables-executables", "IPTABLES_EXECUTABLES",
        read_executables, {}, "NAME:PATH,...",
        "Programs to use: iptables, iptables-save and iptables-restore, and the three of ip6tables. "
        "All three of a family, or none.",
        accumulates=True,
    ),
    Option(
        "comments_disabled", Section.ENGINE, "comments.disabled", "--disable-comments", "COMMENTS_DISABLED",
        read_bool, False, "",
        "Write rules without comments.",
    ),
    Option(
        "wait", Section.ENGINE, "wait", "--wait", "WAIT", Number(0, MAX_UNSIGNED), 5, "SECONDS",
        "How long to wait for the xtables lock; 0 does not wait.",
    ),
    Option(
        "wait_interval", Section.ENGINE, "waitInterval", "--wait-interval", "WAIT_INTERVAL",
        Number(0, MAX_UNSIGNED), 0, "MICROSECONDS",
        "Time between checks whether the lock is free.",
    ),
    Option(
        "max_retries", Section.ENGINE, "retry.maxRetries", "--max-retries", "RETRY_MAX_RETRIES",
        Number(0, 1000), 4, "NUMBER",
        "How many times to retry when the kernel refuses.",
    ),
    Option(
        "sleep_between_retries", Section.ENGINE, "retry.sleepBetweenRetries", "--sleep-between-retries",
        "RETRY_SLEEP_BETWEEN_RETRIES", read_duration, 2.0, "DURATION",
        "Pause between retries: 2s, 500ms.",
    ),
    Option(
        "store_firewalld", Section.ENGINE, "storeFirewalld", "--store-firewalld", "STORE_FIREWALLD",
        read_bool, False, "",
        "Keep the rules in firewalld's direct.xml too, so that its reloads and the next boot restore them.",
    ),
    Option(
        "firewalld_reload", Section.ENGINE, "firewalldReload", "--firewalld-reload", "FIREWALLD_RELOAD",
        read_bool, False, "",
        "Reload firewalld after --store-firewalld, so that firewalld itself loads the rules.", new=True,
    ),
    Option(
        "verbose", Section.RUN, "verbose", "--verbose", "VERBOSE", read_bool, False, "",
        "Print more about what is done.",
    ),
    Option(
        "dry_run", Section.RUN, "dryRun", "--dry-run", "DRY_RUN", read_bool, False, "",
        "Print what would be given to the kernel, and change nothing.",
    ),
)  # fmt: skip

BY_NAME = {option.name: option for option in OPTIONS}
BY_KEY = {option.key: option for option in OPTIONS}
BY_VARIABLE = {option.variable: option for option in OPTIONS}

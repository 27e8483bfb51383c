"""The configuration that counts: the value of every option, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tpctl.config.options import BY_NAME
from tpctl.spec.exclusions import Interfaces, Mark
from tpctl.spec.policy import Network, Ports, UidExclusion, VirtualNetwork

DEFAULT_ORIGIN = "default"


class Config(NamedTuple):
    """The effective value of every option (docs/commands.md), and where each came from."""

    proxy_user: str
    ip_family_mode: str
    dataplane_file: str
    dataplane_variables: Mapping[str, str]
    inbound_enabled: bool
    inbound_port: int
    inbound_exclude_ports: Ports
    inbound_include_ports: Ports
    inbound_exclude_sources: tuple[Network, ...]
    inbound_insert: bool
    inbound_mode: str
    ssh_guard: bool
    guard_ports: bool
    outbound_enabled: bool
    outbound_port: int
    outbound_exclude_ports: Ports
    outbound_include_ports: Ports
    outbound_exclude_destinations: tuple[Network, ...]
    outbound_exclude_uids: tuple[UidExclusion, ...]
    outbound_exclude_marks: tuple[Mark, ...] | str
    """"auto" means those that the host's routing rules keep out of tunnels."""
    outbound_insert: bool
    cgroup: str
    dns_enabled: bool
    dns_capture_all: bool
    dns_port: int
    dns_tcp: bool
    resolv_conf: str
    dns_skip_zone_split: bool
    virtual_networks: tuple[VirtualNetwork, ...]
    exclude_interfaces: tuple[Interfaces, ...]
    drop_invalid: bool
    log_enabled: bool
    log_level: int
    engine: str
    iptables_mode: str
    when_proxy_down: str
    ebpf_enabled: bool
    ebpf_cgroup: str
    ebpf_bpffs: str
    ebpf_instance_ip: str
    ebpf_programs_source_path: str
    ebpf_tc_attach_iface: str
    experimental_engine: bool
    executables: Mapping[str, str]
    comments_disabled: bool
    wait: int
    wait_interval: int
    max_retries: int
    sleep_between_retries: float
    """Seconds."""
    store_firewalld: bool
    firewalld_reload: bool
    verbose: bool
    dry_run: bool
    origins: Mapping[str, str]
    """By attribute: "flag --x", "environment TPCTL_X", "file f: a.b" or "default"."""
    notices: tuple[str, ...]

    def origin(self, name: str) -> str:
        """Where an attribute's value came from, as a message begins; for a default the flag that would change it."""
        where = self.origins[name]
        return f"flag {BY_NAME[name].flag} (its default)" if where == DEFAULT_ORIGIN else where

    def is_given(self, name: str) -> bool:
        """Whether somebody gave the value, as opposed to the default."""
        return self.origins[name] != DEFAULT_ORIGIN

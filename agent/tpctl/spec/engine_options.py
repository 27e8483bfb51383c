"""How an engine works, as opposed to what it should achieve (that is `tpctl.spec.policy`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The user's choices about engines; each has the meaning of kumactl's flag of the same name."""

    engine: str = "auto"
    """"auto", "nftables", "iptables" or "ebpf"."""
    iptables_because: str | None = None
    """Why "auto" must mean iptables, if it must."""
    iptables_mode: str = "auto"
    """"auto" (what the host's own iptables command is), "nft" or "legacy"."""
    executables: Mapping[str, str] = field(default_factory=dict)
    """Paths by name: iptables, iptables-save, iptables-restore, ip6tables, ip6tables-save, ip6tables-restore."""
    comments: bool = True
    wait_seconds: int = 5
    """How long to wait for /run/xtables.lock; 0 does not wait."""
    wait_interval_microseconds: int = 0
    max_retries: int = 4
    sleep_between_retries_seconds: float = 2.0
    verbose: bool = False
    ebpf_cgroup: str = ""
    """The directory of control groups that the programs are attached to; "" is the root of the hierarchy."""
    ebpf_bpffs: str = ""
    """The BPF file system that keeps the programs; "" is the host's."""
    store_firewalld: bool = False
    """Keep the rules in firewalld's direct.xml as well."""
    reload_firewalld: bool = False
    """Reload firewalld once they are there."""

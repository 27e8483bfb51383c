"""The eBPF engine's intention for a policy: programs, what their maps hold, what nftables does beside them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tpctl.bpf.programs import POLICY_MAPS, PROGRAMS, Program, Scope
from tpctl.engines.ebpf.companion import GUARD, INVALID_PACKETS, Companion, companion_of
from tpctl.engines.ebpf.contents import Contents, contents_for, describe
from tpctl.spec.policy import Cgroup, Network, Policy, WhenProxyDown
from tpctl.system.errors import InputError


@dataclass(frozen=True, slots=True)
class EbpfPlan:
    """What the programs' maps hold for a policy, and what is done beside them."""

    contents: Contents
    cgroup: Cgroup | None = None
    """Whose connections are redirected; None means those of every process."""
    companion: Companion | None = None
    programs: tuple[Program, ...] = PROGRAMS

    def render(self) -> str:
        """The programs and what their maps would hold, a line an entry; then the table beside them."""
        scopes = {scope: scope.value for scope in Scope}
        if self.cgroup:
            scopes[Scope.APPLICATIONS] = f"the cgroup {self.cgroup}"
        lines = [f"program {program.name} on {scopes[program.scope]}" for program in self.programs]
        text = "\n".join([*lines, *listing(self.contents, 0)]) + "\n"
        if self.companion:
            text += f"# nf_tables, for {', '.join(self.companion.purposes)}\n{self.companion.plan.render()}"
        return text


def plan_for(
    policy: Policy, local: Iterable[Network] = (), *, chooses_sockets: bool = True, comments: bool = True
) -> EbpfPlan:
    """The plan for a policy on a kernel with or without sk_lookup programs, and with local networks. Pure.

    Raises InputError for what cannot be done.
    """
    companion = companion_of(policy, chooses_sockets=chooses_sockets, comments=comments)
    if companion and policy.when_proxy_down is WhenProxyDown.BYPASS:
        unable = [purpose for purpose in companion.purposes if purpose not in (INVALID_PACKETS, GUARD)]
        if unable:
            raise InputError(
                f"--when-proxy-down bypass: {' and '.join(unable)} are left to nftables, whose rules cannot see "
                "whether anything listens; drop one of the two"
            )
    programs = tuple(one for one in PROGRAMS if chooses_sockets or one.scope is not Scope.NAMESPACE)
    return EbpfPlan(contents_for(policy, local), policy.cgroup, companion, programs)


def listing(contents: Contents, netns: int) -> list[str]:
    """The entries of the policy maps, a line each; `netns` is what the kernel knows the network namespace by."""
    return sorted(
        f"map {name}: {describe(name, key, value)}"
        for name in POLICY_MAPS
        for key, value in contents.entries(name, netns).items()
    )

"""What other software holds in the kernel, as far as tpctl has to know of it; and taking it away when told to."""

from __future__ import annotations

from collections.abc import Sequence

from tpctl.engines.iptables.engine import docker_dns, select
from tpctl.spec.engine_options import EngineOptions


def has_docker_dns() -> bool:
    """Whether Docker's embedded DNS server is wired into this network namespace by rules of iptables."""
    return docker_dns()


def everything(tables: Sequence[str]) -> list[str]:
    """Every rule and chain in the named tables of iptables, whoever made them, in both variants and families."""
    return select(EngineOptions()).everything(tables)


def flush(tables: Sequence[str]) -> list[str]:
    """Remove what `everything` lists; says what went."""
    return select(EngineOptions()).flush(tables)

"""What firewalld keeps of our rules follows what is installed: the part of the lifecycle that knows of it.

Other network namespaces share firewalld's files, so there only a record says that they are about the rules of this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpctl.host.proc import in_first_namespace
from tpctl.system.errors import HostError, TpctlError

if TYPE_CHECKING:
    from tpctl.persist.firewalld import Change
    from tpctl.record.state import State


def change(record: State, previous: State | None = None) -> Change | None:
    """What has to change in firewalld's files for a record. Raises HostError before anything is touched."""
    if record.options.store_firewalld:
        from tpctl.engines import direct
        from tpctl.persist import firewalld

        return firewalld.storing(direct.of_policy(record.policy, record.options), record.policy)
    if _concerns(previous):
        from tpctl.persist import firewalld

        return firewalld.removing()
    return None


def remove(record: State | None, removed: list[str], *, dry_run: bool) -> str | None:
    """Take our rules out, and say so in `removed`; hands back what went wrong, because the kernel comes first."""
    if not _concerns(record):
        return None
    from tpctl.persist import firewalld

    try:
        if found := firewalld.removing():
            removed.append(f"tpctl's and kumactl's elements of {found.path}")
            if not dry_run:
                found.carry_out()
    except TpctlError as error:
        return str(error)
    if not dry_run:
        firewalld.tidy()
    return None


def tidy(record: State) -> None:
    """Where nothing has to change for a record: what a killed tpctl was writing would otherwise stay."""
    if record.options.store_firewalld:
        from tpctl.persist import firewalld

        firewalld.tidy()


def remove_files(*, dry_run: bool = False) -> tuple[str, ...]:
    """Take this host's unit files and compiled programs away, unless this is another network namespace; says what."""
    if not in_first_namespace():
        return ()
    from tpctl.bpf import build
    from tpctl.persist import reserved_ports, systemd

    units = tuple(f"the unit file {path}" for path in systemd.remove(dry_run=dry_run))
    reserved = tuple(f"the file {path}" for path in reserved_ports.release(systemd.ROOT, dry_run=dry_run))
    return (*units, *reserved, *build.forget(dry_run=dry_run))


def require_firewalld() -> None:
    """Raise HostError unless there is a firewalld that can reload."""
    from tpctl.persist import firewalld

    if not firewalld.is_running():
        raise HostError("--firewalld-reload: firewalld does not run on this host; leave the flag out, or start it")


def await_firewalld() -> None:
    """Let a firewalld that is just starting flush the tables first.

    systemd takes it for started when it has its name on the bus; asked for its state, it answers when its rules are in.
    """
    from tpctl.persist import firewalld

    if in_first_namespace() and firewalld.DIRECTORY.is_dir():
        firewalld.is_running()


def reload() -> None:
    """Let firewalld read its files. Raises ApplyError."""
    from tpctl.persist import firewalld

    firewalld.reload()


def _concerns(record: State | None) -> bool:
    return bool(record and record.options.store_firewalld) or in_first_namespace()

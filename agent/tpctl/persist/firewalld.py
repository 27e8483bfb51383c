"""--store-firewalld: our rules in firewalld's direct.xml, so that its starts and reloads bring them back.

firewalld owns every rule of iptables on a host with direct rules: whenever it starts or reloads it flushes all tables,
then writes what direct.xml says. So the file holds all our rules, and is checked by firewalld itself before it counts.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tpctl.engines import direct
from tpctl.host.proc import in_first_namespace
from tpctl.persist import address, files
from tpctl.record import state
from tpctl.system import runner
from tpctl.system.errors import ApplyError, HostError

if TYPE_CHECKING:
    from tpctl.engines.direct import DirectRules
    from tpctl.spec.policy import Policy

DIRECTORY = Path("/etc/firewalld")
CHECKER = "firewall-offline-cmd"
CLIENT = "firewall-cmd"
NEW_FILE_MODE = 0o640
RELOAD_SECONDS = 120.0
_OUTPUT = "inet firewalld filter_OUTPUT"


@dataclass(frozen=True, slots=True)
class Change:
    """A checked replacement of direct.xml that has not happened yet."""

    path: Path
    after: bytes | None
    """None removes the file: nothing was in it but ours."""
    drop_in: bytes | None = None
    """What the unit's drop-in shall say; None: there shall be none."""

    def opposite(self) -> Change:
        """What brings back what stands there now. Raises HostError."""
        return Change(self.path, files.read(self.path), address.current())

    def carry_out(self) -> None:
        """Make it the file that counts. Raises ApplyError."""
        if self.after is None:
            files.remove(self.path)
        elif self.after != files.read(self.path):
            files.replace(self.path, self.after, mode=NEW_FILE_MODE)
        address.settle(self.drop_in)


def storing(rules: DirectRules, policy: Policy) -> Change | None:
    """What stores a policy's rules; None when that is stored. Raises HostError: nothing was touched then."""
    from tpctl.persist import direct_xml

    if rules.cgroup:
        raise HostError(
            f"--store-firewalld with --cgroup: the rules name the control group {rules.cgroup}, and while it does not "
            "exist, as at boot, firewalld could load none of its own rules; leave --store-firewalld out"
        )
    if policy.inbound.is_transparent:
        raise HostError(
            "--store-firewalld with --inbound-mode tproxy: that needs a routing rule too, which firewalld does not "
            "keep; leave --store-firewalld out, and use `tpctl persist --systemd` for the next boot"
        )
    path = DIRECTORY / "direct.xml"
    if not DIRECTORY.is_dir():
        raise HostError(f"there is no {DIRECTORY}: firewalld is not installed; leave out --store-firewalld")
    before = files.read(path)
    try:
        after = direct_xml.with_rules(direct_xml.EMPTY if before is None else before, rules)
    except direct_xml.UnreadableError as error:
        raise HostError(f"{path} is not what firewalld.direct(5) describes ({error}); fix it first") from error
    drop_in = address.drop_in(policy)
    if (after, drop_in) == (before, address.current()):
        return None
    _check(after)
    return Change(path, after, drop_in)


def removing() -> Change | None:
    """What takes our rules out; None when there are none. Raises HostError when the file cannot be understood."""
    path = DIRECTORY / "direct.xml"
    before = files.read(path)
    if before is None or not any(mark.encode() in before for mark in direct.MARKS):
        return Change(path, before) if address.current() else None
    from tpctl.persist import direct_xml  # lazily: hardly any host has anything of ours there

    try:
        after = direct_xml.without_ours(before)
    except direct_xml.UnreadableError as error:
        raise HostError(
            f"{path} mentions tpctl or kumactl, but is not what firewalld.direct(5) describes ({error}); "
            "remove the elements with TPCTL_ and KUMA_MESH_ by hand"
        ) from error
    if after == before:
        return None
    if after == direct_xml.EMPTY:
        return Change(path, None)
    if shutil.which(CHECKER, path=runner.SEARCH_PATH):
        _check(after)
    return Change(path, after)


def tidy() -> None:
    """Remove what a tpctl that was killed has left beside its files, as far as that goes: nobody reads it."""
    with suppress(OSError):
        files.clear_leftovers((DIRECTORY / "direct.xml").resolve())
        if in_first_namespace():
            files.clear_leftovers(address.DROP_IN)


def is_running() -> bool:
    """Whether a firewalld answers that manages this host."""
    try:
        return runner.run([CLIENT, "--state"]).ok
    except (FileNotFoundError, ApplyError):
        return False


def reload() -> None:
    """Let firewalld read its files again; it then holds the rules. Raises ApplyError."""
    try:
        done = runner.run([CLIENT, "--reload"], timeout=RELOAD_SECONDS)
    except FileNotFoundError:
        raise ApplyError(f"direct.xml is written, but there is no {CLIENT} to make firewalld reload") from None
    if not done.ok:
        raise ApplyError(f"direct.xml is written, but firewalld did not reload: {done.failure()}")


def _check(content: bytes) -> None:
    """Let firewalld judge its whole configuration with this direct.xml in it. Raises HostError."""
    try:
        with state.scratch() as folder:
            copy = folder / "firewalld"
            shutil.copytree(DIRECTORY, copy)
            (copy / "direct.xml").write_bytes(content)
            done = runner.run([CHECKER, "--system-config", str(copy), "--check-config"])
    except FileNotFoundError:
        raise HostError(f"{CHECKER} is not on this host, so direct.xml cannot be checked; install firewalld") from None
    except (OSError, shutil.Error, ApplyError) as error:
        raise HostError(f"firewalld's configuration cannot be checked: {error}") from error
    if not done.ok:
        said = done.failure().replace(str(copy), str(DIRECTORY))
        raise HostError(f"firewalld refuses its configuration with tpctl's rules in it; nothing was written: {said}")

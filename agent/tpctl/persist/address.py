"""The address ::6 beside rules that firewalld brings back: direct.xml can hold no addresses, so the unit adds it."""

from __future__ import annotations

import shutil

from tpctl.host.proc import in_first_namespace
from tpctl.persist import files, systemd
from tpctl.spec.policy import PASSTHROUGH6, Family, Policy
from tpctl.system import runner
from tpctl.system.errors import ApplyError

DROP_IN = systemd.ROOT / systemd.UNITS / "firewalld.service.d/10-tpctl.conf"


def drop_in(policy: Policy) -> bytes | None:
    """What the drop-in says for a policy; None when it needs none, or systemd does not run firewalld here."""
    program = shutil.which("ip", path=runner.SEARCH_PATH)
    if Family.IPV6 not in policy.families or not program or not _is_firewalld_of_systemd():
        return None
    lines = (
        "# The rules in direct.xml count on this address, from which the data plane calls the application.",
        "[Service]",
        f"ExecStartPost=-+{program} -6 address replace {PASSTHROUGH6}/128 dev {policy.loopback}",
    )
    return ("\n".join(lines) + "\n").encode()


def current() -> bytes | None:
    """What the drop-in says now; None when there is none. Raises HostError."""
    return files.read(DROP_IN) if in_first_namespace() else None


def settle(content: bytes | None) -> None:
    """Make the drop-in say that, and systemd know of it; None takes it away. Raises ApplyError."""
    if content == current():
        return
    if content is None:
        files.remove(DROP_IN)
        if not any(DROP_IN.parent.iterdir()):
            DROP_IN.parent.rmdir()
    else:
        try:
            DROP_IN.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ApplyError(f"{DROP_IN.parent} cannot be made: {error.strerror}") from error
        files.replace(DROP_IN, content, mode=systemd.FILE_MODE)
    systemd.reload()


def _is_firewalld_of_systemd() -> bool:
    units = (systemd.ROOT / place / "firewalld.service" for place in systemd.PLACES)
    return in_first_namespace() and any(unit.exists() for unit in units)

"""What stays for connections that run goes when they have ended, without anybody's doing.

A chain or an address in the kernel has no end of its own, so a process waits: a unit of systemd's where that runs this
network namespace (which outlives the service whose stop is an uninstall), a process with a session of its own
elsewhere. Where it is killed, the next tpctl command does its work.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import syslog
import time
from collections.abc import Collection, Sequence

from tpctl.change import background, draining
from tpctl.engines import leftovers, registry
from tpctl.host.privilege import require_root
from tpctl.record import state
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family
from tpctl.system.errors import ApplyError, TpctlError

UNIT = "tpctl-finish"
_DESCRIPTION = "tpctl removes what connections needed that have ended"
PLACE = "\0tpctl-finish"
"""A socket of this name is bound by who waits in this network namespace (unix(7), abstract)."""
FIRST_SECONDS, LONGEST_SECONDS = 1.0, 60.0
SHARE = 50
"""Between two looks it sleeps so many times as long as a look takes."""
MOST_FAILURES = 20


def see_to(notices: Sequence[str]) -> tuple[str, ...]:
    """Start who waits, if there are `notices` of connections that run; hands them back, with any trouble."""
    if not notices:
        return ()
    command = background.argv("uninstall", "--finish")
    unit = f"{UNIT}-{os.urandom(4).hex()}"
    if not background.start_unit(background.unit_argv(unit, _DESCRIPTION, (), command)):
        try:
            background.start_process(command)
        except ApplyError as error:
            return (*notices, f"warning: nobody waits for that ({error}): run `tpctl status` when they have ended")
    return tuple(notices)


def finish() -> None:
    """Wait until nothing is left of what stays for connections, and take it away. For who waits."""
    require_root("tpctl uninstall")
    place = _only_one()
    if place is None:
        return
    failures = 0
    with place:
        while True:
            began = time.monotonic()
            with contextlib.suppress(OSError):  # a socket that listens nowhere, or nobody asked
                place.accept()[0].close()
            try:
                if not draining.waiting(state.load_policy()) and _done(place):
                    return
                failures = 0
            except (TpctlError, OSError) as error:
                failures += 1
                if failures == MOST_FAILURES:
                    syslog.syslog(syslog.LOG_NOTICE, f"tpctl: what stays for connections cannot be removed: {error}")
                    raise
            time.sleep(min(max(SHARE * (time.monotonic() - began), FIRST_SECONDS), LONGEST_SECONDS))


def tidy(record: state.State | None, holding: Collection[str]) -> int:
    """Remove what stays and nothing needs any more; hands back how many connections still need something.

    `holding` are the engines that have rules in place. To be called under the lock: until an install has its rules
    there, what it needs for them looks left over.
    """
    running = 0 if "nftables" in holding else leftovers.end()
    if not holding or (record and not record.policy.inbound.is_transparent):
        running += draining.tidy_answers()[0]
    if not holding:  # these redirected connections are counted already, and some of those below may be
        running = max(running, draining.tidy_device_routes()[0])
    if not holding or (record and Family.IPV6 not in record.policy.families):
        name = record.policy.loopback if record else "lo"
        running = max(running, draining.tidy_address(name)[0])
    return running


def _done(place: socket.socket) -> bool:
    """Look closely, and remove what can go; whether nothing is left to wait for."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(state.locked(wait=0.0, is_way_out=True))
        except ApplyError:
            return False  # another tpctl works
        record = state.load()
        options = record.options if record else EngineOptions()
        holding = [engine.name for engine in registry.available(options) if engine.inspect(None).installed]
        if tidy(record, holding):
            return False
        place.close()  # under the lock: whoever leaves something after this starts another one
        return True


def _only_one() -> socket.socket | None:
    """A socket that is bound to the place, or to none where somebody else than root has that; None beside another."""
    mine = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        mine.bind(PLACE)
        mine.listen()
    except OSError:
        if _is_roots():
            mine.close()
            return None
    return mine


def _is_roots() -> bool:
    """Whether root has the place; anybody can bind the name. Where that cannot be told, two wait: no harm is done."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as other:
        try:
            other.connect(PLACE)
            size = struct.calcsize("3i")
            _, uid, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        except OSError:
            return False
        return bool(uid == os.geteuid())

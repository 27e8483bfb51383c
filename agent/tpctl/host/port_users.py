"""Who has a port of this host, so that nobody else can listen on it; in words, for messages."""

from __future__ import annotations

from collections.abc import Iterable

from tpctl.host import holders
from tpctl.host.sock_diag import CLOSE, LISTEN, Socket
from tpctl.system import text

_IDLE = (CLOSE, LISTEN)


def in_words(sockets: Iterable[Socket]) -> tuple[str, ...]:
    """What each of these sockets does, and whose it is; those that are nobody's any more (TIME_WAIT) are left out.

    Processes of others can be seen by root alone.
    """
    held = [one for one in sockets if one.inode]
    processes = holders.processes(one.inode for one in held)
    found = []
    for one in held:
        names = (f"{text.on_one_line(process.name)} (process {process.number})" for process in processes[one.inode])
        who = f"{', '.join(names) or 'a process'} of uid {one.uid}"
        found.append(f"{who} listens there" if one.state in _IDLE else f"a connection of {who} goes out from it")
    return tuple(dict.fromkeys(found))

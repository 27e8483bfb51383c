"""The users of the host, from its user database (files, LDAP, whatever nsswitch.conf names)."""

from __future__ import annotations

import contextlib
import pwd
from collections.abc import Callable, Iterable

from tpctl.system.child import ChildFailedError, in_child
from tpctl.system.errors import ApplyError, HostError

DEFAULT_PROXY_UID = 5678
DEFAULT_PROXY_NAME = "kuma-dp"
"""kumactl's defaults: the uid its packages create the user with, and that user's name."""


SECONDS = 20.0
"""How long the user database may take: sssd and LDAP servers that do not answer take it for minutes, or for ever."""


def uid_of(user: str) -> int | None:
    """The uid of an existing user, given by uid or by name; None when there is none. A uid is tried first.

    Raises HostError when the user database does not answer.
    """

    def look() -> str | int:
        if user.isascii() and user.isdigit():
            with contextlib.suppress(KeyError, OverflowError):
                return pwd.getpwuid(int(user)).pw_uid
        return pwd.getpwnam(user).pw_uid

    found = _asked(user, look)
    return None if found is None else int(found)


def name_of(uid: int) -> str | None:
    """The name of a uid, or None when the user database has none. Raises HostError when it does not answer."""
    return _asked(str(uid), lambda: pwd.getpwuid(uid).pw_name)


def names_of(uids: Iterable[int], *, seconds: float = SECONDS) -> dict[int, str]:
    """The names of those that have one; none where the user database does not answer in time."""

    def look() -> str:
        found = []
        for uid in wanted:
            with contextlib.suppress(KeyError):
                found.append(f"{uid} {pwd.getpwuid(uid).pw_name}")
        return "\n".join(found)

    wanted = list(dict.fromkeys(uids))
    if not wanted:
        return {}
    try:
        lines = in_child(look, seconds=seconds).split("\n")
    except (ApplyError, ChildFailedError):
        return {}
    return {int(uid): name for uid, _, name in (line.partition(" ") for line in lines) if name}


def _asked(user: str, look: Callable[[], str | int]) -> str | None:
    """Look in a child: the C library runs whatever modules nsswitch.conf(5) names, and cannot be interrupted."""

    def work() -> str:
        try:
            return str(look())
        except (KeyError, OverflowError, ValueError):
            return ""

    try:
        what, why = f"the user database (nsswitch.conf) has not told about the user {user}", "and nothing was changed"
        return in_child(work, seconds=SECONDS, what=what, why=why) or None
    except ApplyError as error:
        raise HostError(str(error)) from error
    except ChildFailedError as error:
        raise HostError(
            f"the user {user} cannot be looked for in the user database (nsswitch.conf): {error}"
        ) from error

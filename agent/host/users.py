"""The users of the host, from its user database (files, LDAP, whatever nsswitch.conf names)."""

from __future__ import annotations

import pwd

DEFAULT_PROXY_UID = 5678
DEFAULT_PROXY_NAME = "kuma-dp"
"""kumactl's defaults: the uid its packages create the user with, and that user's name."""


def uid_of(user: str) -> int | None:
    """The uid of an existing user, given by uid or by name; None when there is none. A uid is tried first."""
    if user.isascii() and user.isdigit():
        try:
            return pwd.getpwuid(int(user)).pw_uid
        except (KeyError, OverflowError):
            pass
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        return None


def name_of(uid: int) -> str | None:
    """The name of a uid, or None when the user database has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return None

"""Whose the files have to be that the relay trusts: keys, certificates, authorities, and its own DNS zone."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from agent.errors import InputError
from agent.host.users import uid_of
from agent.input_files import UnusableFileError, judge
from agent.relay.settings import Settings


def require_own(settings: Settings) -> None:
    """Started as root, take no file that others than root and the relay's user may change, and no key they may read.

    Raises InputError with every problem. Once the relay has become its user it asks nobody: it has no rights to lose,
    and what was good at the start only root and that user can have changed.
    """
    if os.geteuid() != 0:
        return
    user = (uid_of(settings.user) if settings.user is not None else None) or 0
    problems = []
    for where, path, is_key in _files(settings):
        try:
            judge(path, user, _group_of(user) if is_key else None)
        except UnusableFileError as error:
            problems.append(f"{where}: {path} {error}")
    if problems:
        raise InputError(problems)


def _files(settings: Settings) -> Iterator[tuple[str, Path, bool]]:
    """What a file is for, where it is, and whether it is a private key."""
    if settings.dns.zone_file is not None:
        yield "DNS zone file", settings.dns.zone_file, False
    for listener in settings.listeners:
        for section in ("ssl", "upstream_tls"):
            for name in ("certificate", "certificate_key", "client_ca_file", "ca_file"):
                path = getattr(getattr(listener, section), name, None)
                if path is not None:
                    yield f"listener {listener.name}: {section}.{name}", path, name == "certificate_key"


def _group_of(uid: int) -> str:
    """The name of a user's own group, or its number where it has none."""
    number = pwd.getpwuid(uid).pw_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)

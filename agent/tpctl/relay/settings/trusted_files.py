"""Whose the files have to be that the relay trusts: keys, certificates, authorities, and its own DNS zone."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from tpctl.host.users import uid_of
from tpctl.relay.settings.model import ServicePorts, Settings
from tpctl.relay.settings.services import files_of
from tpctl.system import input_files
from tpctl.system.errors import InputError
from tpctl.system.input_files import UnusableFileError, judge


def require_file(settings: Settings) -> None:
    """Raise InputError when resolv.conf is anything but a file. It may be missing, and come later."""
    path = settings.dns.resolv_conf
    try:
        input_files.require_file(path)
    except OSError as error:
        if path.exists() and not path.is_file():
            raise InputError(f"resolv.conf: {path} cannot be read: {error.strerror}") from None


def require_own(settings: Settings) -> None:
    """Started as root, take no file that others than root and the relay's user may change, and no key they may read.

    Raises InputError with every problem. Once the relay has become its user it asks nobody: it has no rights to lose,
    and what was good at the start only root and that user can have changed.
    """
    if problems := list(untrusted(settings)):
        raise InputError(problems)


def untrusted(settings: Settings) -> Iterator[str]:
    """A line for each such file; none unless this is root."""
    if os.geteuid() != 0:
        return
    user = (uid_of(settings.user) if settings.user is not None else None) or 0
    for where, path, is_key in named_files(settings):
        try:
            judge(path, user, group_of(user) if is_key else None)
        except UnusableFileError as error:
            yield f"{where}: {path} {error}"


def named_files(settings: Settings) -> Iterator[tuple[str, Path, bool]]:
    """What a file is for, where it is, and whether others may not read it: a private key, or a secret."""
    if settings.dns.zone_file is not None:
        yield "DNS zone file", settings.dns.zone_file, False
    for listener in settings.listeners:
        for section in ("ssl", "upstream_tls"):
            for name in ("certificate", "certificate_key", "client_ca_file", "ca_file"):
                path = getattr(getattr(listener, section), name, None)
                if path is not None:
                    yield f"listener {listener.name}: {section}.{name}", path, name == "certificate_key"
        if isinstance(listener.upstream, ServicePorts) and listener.upstream.file is not None:
            yield f"listener {listener.name}: dataplane_file", listener.upstream.file, False
        for service in listener.services:
            for key, path, is_key in files_of(service):
                yield f"listener {listener.name}: service {service.name}: {key}", path, is_key
    for name, secret in settings.secrets.items():
        if secret.file is not None:
            yield f"secrets.{name}.file", secret.file, True


def group_of(uid: int) -> str:
    """The name of a user's own group, or its number where it has none."""
    number = pwd.getpwuid(uid).pw_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)

"""What the shell offers for the value of an option: words, users, interfaces, control groups, files.

These are given to click as `shell_complete`; `tpctl.cli.complete.completing` talks to the shell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from tpctl.config.options import Option

Candidates = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]

MAX_GROUPS = 500
"""A host with thousands of containers shall not keep the terminal waiting."""
_UNITS = (".service", ".slice", ".scope")


def words(*known: str) -> Candidates:
    """A few fixed words."""
    return lambda context, parameter, incomplete: _items(known, incomplete)


def users(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The users of this host."""
    import pwd

    return _items((user.pw_name for user in pwd.getpwall()), incomplete)


def interfaces(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The interfaces of this network namespace; of a list with commas, the last one."""
    before, comma, last = incomplete.rpartition(",")
    return _items((before + comma + name for name in _interfaces()), before + comma + last)


def bridges(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The same, where a network comes after a colon."""
    return _items((f"{name}:" for name in _interfaces()), incomplete)


def groups(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The control groups of units, by the path from the root of the hierarchy."""
    return _items(_groups(), incomplete)


def commands(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The commands of tpctl."""
    root = context.find_root().command
    return _items(root.list_commands(context), incomplete) if isinstance(root, click.Group) else []


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files, which the shell itself knows."""
    return [_item(incomplete, kind="file")]


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Directories, likewise."""
    return [_item(incomplete, kind="dir")]


def of(option: Option) -> Candidates | None:
    """What is offered for an input of a policy."""
    from tpctl.config.values import Choice

    if option.is_bool:
        return words("true", "false")
    if isinstance(option.read, Choice):
        return words(*option.read.allowed)
    return {
        "USER": users,
        "INTERFACE[+],...": interfaces,
        "INTERFACE[+]:CIDR": bridges,
        "CGROUP": groups,
        "FILE": files,
        "DIR": folders,
    }.get(option.metavar)


def _item(value: str, kind: str = "plain") -> CompletionItem:
    from click.shell_completion import CompletionItem

    return CompletionItem(value, type=kind)


def _items(values: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [_item(value) for value in values if value.startswith(incomplete)]


def _interfaces() -> list[str]:
    import socket

    return [name for _, name in socket.if_nameindex()]


def _groups() -> list[str]:
    """Those of systemd's units that run, and of slices. Nothing where there is no unified hierarchy."""
    import os

    from tpctl.host import cgroups
    from tpctl.system.errors import HostError

    found: list[str] = []
    try:
        root = cgroups.root()
    except (HostError, OSError):
        return found
    for folder, below, _ in os.walk(root):
        below[:] = sorted(name for name in below if name.endswith(_UNITS))
        path = os.path.relpath(folder, root)
        found += [os.path.normpath(f"{path}/{name}") for name in below]
        if len(found) >= MAX_GROUPS:
            break
    return found

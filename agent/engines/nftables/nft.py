"""The way to nf_tables: libnftables in process where its Python module is installed, else the nft program.

Both take nft's language and make one transaction of a text: the kernel carries out all of it or nothing.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agent.child import ChildFailedError, in_child
from agent.errors import HostError
from agent.runner import run

Objects = list[dict[str, Any]]
"""What libnftables-json(5) calls the ruleset objects."""


class NftError(Exception):
    """nf_tables refused; the message is nft's own, as one line. Nothing was changed."""


class Nft(Protocol):
    """One way to nf_tables, in the network namespace it was made in."""

    description: str
    knows_sets: bool
    """Whether the rules of a text may look into sets that an earlier text made."""

    def execute(self, text: str) -> None:
        """Carry a text out in one transaction. Raises NftError, ApplyError when it did not end in time."""
        ...

    def check(self, text: str) -> None:
        """Let the kernel judge a text without carrying it out. Raises NftError."""
        ...

    def objects(self, command: str) -> Objects:
        """The objects that a list command finds. Raises NftError."""
        ...

    def found(self, commands: Sequence[str]) -> list[Objects | None]:
        """What each of several list commands finds; None where one fails."""
        ...

    def listing(self, command: str) -> str:
        """What a list command prints, without counters' values. Raises NftError."""
        ...


class LibraryNft:
    """libnftables. Each call has a context of its own: a context keeps the namespace it was made in.

    And a process of its own: the library reads anew as long as others change rules while it reads, without an end.
    """

    description = "libnftables"
    knows_sets = True

    def __init__(self, module: Any) -> None:
        self._module = module

    def execute(self, text: str) -> None:
        """See Nft."""
        self._run(text)

    def check(self, text: str) -> None:
        """See Nft."""
        self._run(text, dry_run=True)

    def objects(self, command: str) -> Objects:
        """See Nft."""
        return _parsed(self._run(command, json_output=True))

    def found(self, commands: Sequence[str]) -> list[Objects | None]:
        """See Nft. One child for all."""
        return list(json.loads(in_child(lambda: json.dumps([self._found(command) for command in commands]))))

    def _found(self, command: str) -> Objects | None:
        try:
            return _parsed(self._called(command, {"json_output": True}))
        except NftError:
            return None

    def listing(self, command: str) -> str:
        """See Nft."""
        return self._run(command, stateless_output=True)

    def _run(self, text: str, **settings: bool) -> str:
        try:
            return in_child(lambda: self._called(text, settings))
        except ChildFailedError as failed:
            raise NftError(_one_line(str(failed))) from None

    def _called(self, text: str, settings: Mapping[str, bool]) -> str:
        library = self._module.Nftables()
        for name, value in settings.items():
            getattr(library, f"set_{name}")(value)
        code, output, error = library.cmd(text)
        if code != 0:
            raise NftError(error)
        return str(output)


class ProgramNft:
    """The nft program, for hosts without the Python module."""

    description = "nft"

    def __init__(self, *, knows_sets: bool = True) -> None:
        self.knows_sets = knows_sets

    def execute(self, text: str) -> None:
        """See Nft."""
        self._run("--file", "-", text=text)

    def check(self, text: str) -> None:
        """See Nft."""
        self._run("--check", "--file", "-", text=text)

    def objects(self, command: str) -> Objects:
        """See Nft."""
        # Not from stdin: with --json, nft reads that as JSON first, and has nothing left to read as a command.
        return _parsed(self._run("--json", command))

    def found(self, commands: Sequence[str]) -> list[Objects | None]:
        """See Nft."""
        return [self._found(command) for command in commands]

    def _found(self, command: str) -> Objects | None:
        try:
            return self.objects(command)
        except NftError:
            return None

    def listing(self, command: str) -> str:
        """See Nft."""
        return self._run("--stateless", command)

    def _run(self, *arguments: str, text: str | None = None) -> str:
        done = run(["nft", *arguments], stdin=text)
        if not done.ok:
            raise NftError(_one_line(done.stderr))
        return done.stdout


def find() -> Nft:
    """The way to nf_tables on this host. Raises HostError when there is none."""
    try:
        module = importlib.import_module("nftables")
        # That of nftables 0.9.8 (Debian 11) has none, and somebody else's module of that name no such class.
        if hasattr(getattr(module, "Nftables", None), "set_dry_run"):
            return LibraryNft(module)
    except (ImportError, OSError):  # OSError: the module is there, the shared library is not
        pass
    try:
        version = run(["nft", "--version"])
    except FileNotFoundError:
        version = None
    if version is None or not version.ok:
        raise HostError(
            "the nftables engine needs libnftables (package python3-nftables) or the nft program (package nftables), "
            "and this host has neither; install one, or use --engine iptables"
        )
    # 0.9.8 (Debian 11) says "No such file or directory" of a set that is not in the same text (run there).
    return ProgramNft(knows_sets="v0." not in version.stdout)


def held(nft: Nft, where: str) -> Objects | None:
    """The objects of a table (family and name) in this namespace; None when there is none. Raises NftError.

    Of the list commands only this one reads no more than its table. nft starts a reading anew when anybody has changed
    anything meanwhile, so on a host with thousands of rules and a busy owner of them, `list tables` may never end.
    """
    try:
        return nft.objects(f"list table {where}")
    except NftError as error:
        if os.strerror(errno.ENOENT) in str(error):
            return None
        raise


def _parsed(output: str) -> Objects:
    found: Objects = json.loads(output)["nftables"] if output.strip() else []
    return found


def _one_line(error: str) -> str:
    """nft repeats the whole text it was given below its message; the first lines tell what is wrong."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line] or lines
    return " ".join(told[:3])[:500] or "nft gave no reason"

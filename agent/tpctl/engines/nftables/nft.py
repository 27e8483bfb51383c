"""The way to nf_tables: libnftables in process where its Python module is installed, else the nft program.

Both take nft's language and make one transaction of a text: the kernel carries out all of it or nothing.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tpctl.engines import presence
from tpctl.system.child import ChildFailedError, in_child
from tpctl.system.errors import ApplyError, HostError, described
from tpctl.system.runner import TIMEOUT_SECONDS, run
from tpctl.system.text import decoded, encoded, lines

Objects = list[dict[str, Any]]
"""What libnftables-json(5) calls the ruleset objects."""


_STATELESS = {"stateless_output": True}
EXTENSIONS = ("XTABLES_LIBDIR", "IPTABLES_LIB_DIR", "IP6TABLES_LIB_DIR", "IPTABLES_LIBDIR")
"""Variables by which libxtables and python-iptables find what they load, in which the caller shall have no part."""
_ATTEMPTS = 2
"""To take a change back: the first child may have been killed."""


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

    def listing(self, command: str, *, seconds: float = TIMEOUT_SECONDS) -> str:
        """What a list command prints, without counters' values. Raises NftError, ApplyError when it does not end."""
        ...

    def listing_of(self, text: str, command: str) -> str:
        """What a list command prints, as `listing` does, once a text was carried out. Raises NftError."""
        ...

    def listings(self, commands: Sequence[str]) -> list[str | None]:
        """What each of several list commands prints; None where one fails. Raises ApplyError when none is answered."""
        ...

    def numbered(self, command: str, *, seconds: float = TIMEOUT_SECONDS) -> str:
        """What a list command prints, with the kernel's handles. Raises as `listing` does."""
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

    def listing(self, command: str, *, seconds: float = TIMEOUT_SECONDS) -> str:
        """See Nft."""
        return self._run(command, seconds=seconds, stateless_output=True)

    def listing_of(self, text: str, command: str) -> str:
        """See Nft."""

        def work() -> str:
            self._called(text, {})
            return self._called(command, _STATELESS)

        return self._in_child(work)

    def numbered(self, command: str, *, seconds: float = TIMEOUT_SECONDS) -> str:
        """See Nft."""
        return self._run(command, seconds=seconds, stateless_output=True, handle_output=True)

    def listings(self, commands: Sequence[str]) -> list[str | None]:
        """See Nft. One child for all: when it has ended without an answer, libnftables has ended it (out of memory)."""
        if not commands:
            return []
        try:
            said = in_child(lambda: json.dumps([self._listed(command) for command in commands]))
        except ChildFailedError as failed:
            raise ApplyError(f"the rules in nf_tables could not be read: {_one_line(str(failed))}") from None
        return list(json.loads(said))

    def _listed(self, command: str) -> str | None:
        try:
            return self._called(command, _STATELESS)
        except NftError:
            return None

    def _run(self, text: str, *, seconds: float = TIMEOUT_SECONDS, **settings: bool) -> str:
        return self._in_child(lambda: self._called(text, settings), seconds)

    @staticmethod
    def _in_child(work: Callable[[], str], seconds: float = TIMEOUT_SECONDS) -> str:
        try:
            return in_child(work, seconds=seconds)
        except ChildFailedError as failed:
            raise NftError(_one_line(str(failed))) from None

    def _called(self, text: str, settings: Mapping[str, bool]) -> str:
        """In a child: libnftables lists rules of iptables by the extensions of libxtables, found by these variables."""
        for variable in EXTENSIONS:
            os.environ.pop(variable, None)
        library = self._module.Nftables()
        for name, value in settings.items():
            getattr(library, f"set_{name}")(value)
        code, output, error = library.cmd(encoded(text))  # given text, it would want the answer to be UTF-8
        if code != 0:
            raise NftError(decoded(error))
        return decoded(output)


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

    def listing(self, command: str, *, seconds: float = TIMEOUT_SECONDS) -> str:
        """See Nft."""
        return self._run("--stateless", command, seconds=seconds)

    def numbered(self, command: str, *, seconds: float = TIMEOUT_SECONDS) -> str:
        """See Nft."""
        return self._run("--stateless", "--handle", command, seconds=seconds)

    def listing_of(self, text: str, command: str) -> str:
        """See Nft."""
        self.execute(text)
        return self.listing(command)

    def listings(self, commands: Sequence[str]) -> list[str | None]:
        """See Nft."""
        return [self._listed(command) for command in commands]

    def _listed(self, command: str) -> str | None:
        try:
            return self.listing(command)
        except NftError:
            return None

    def _run(self, *arguments: str, text: str | None = None, seconds: float = TIMEOUT_SECONDS) -> str:
        done = run(["nft", *arguments], stdin=text, timeout=seconds)
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
    if presence.lacks(where):
        return None
    try:
        return nft.objects(f"list table {where}")
    except NftError as error:
        if os.strerror(errno.ENOENT) in str(error):
            return None
        from tpctl.engines.nftables import listing

        # Somebody else's rule in it may name what JSON cannot hold.
        tables = listing.read(nft.listing(f"list table {where}"))
        return [found for table in tables for found in table.objects()]


def taken_back(nft: Nft, lines: Callable[[], str]) -> str:
    """Carry out a text that takes a change back; what stopped it is handed back in words, and is empty if nothing did.

    `lines` asks what there is to take back, anew at each attempt.
    """
    failed = ""
    for _ in range(_ATTEMPTS):
        try:
            if text := lines():
                nft.execute(text)
        except Exception as error:  # noqa: BLE001 - what made it necessary is what the user has to know, too
            failed = described(error)
            if isinstance(error, ApplyError):  # it took its time, and would again
                break
        else:
            return ""
    return failed


def _parsed(output: str) -> Objects:
    try:
        found: Objects = json.loads(output)["nftables"] if output.strip() else []
    except ValueError:  # nft 1.0.6 puts a comment into it for a table with an owner
        raise NftError("what nft lists is no JSON") from None
    return found


def _one_line(error: str) -> str:
    """nft repeats the whole text it was given below its message; the first lines tell what is wrong."""
    said = [line.strip() for line in lines(error) if line.strip()]
    told = [line for line in said if "rror" in line] or said
    return " ".join(told[:3])[:500] or "nft gave no reason"

"""The programs that are attached, found by their pinned links; the maps are found through the programs.

Nothing else is pinned: a link holds its program and a program its maps, so one link update changes all of it at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tpctl.bpf import syscall
from tpctl.bpf.programs import MAPS, PROGRAMS, Program, Scope
from tpctl.engines.ebpf.place import Place
from tpctl.spec.policy import Cgroup
from tpctl.system.errors import ApplyError

_SO_ORIGINAL_DST = 80
_NEXT = "_next"
"""The BPF file system allows no dots in names."""


@dataclass(slots=True)
class Attached:
    """A pinned link and what it runs."""

    program: Program
    link: int
    """A descriptor."""
    info: syscall.LinkInfo


@dataclass(slots=True)
class Installed:
    """Everything of ours in one network namespace, with descriptors open."""

    links: dict[str, Attached] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=dict)
    """By name, those of the first program that has them; descriptors."""
    settings: dict[str, int] = field(default_factory=dict)
    """By program: the id of its map of settings. More than one id means a replacement was interrupted."""


@contextmanager
def opened(folder: Path) -> Iterator[Installed]:
    """What is pinned in a folder. Raises OSError."""
    found = Installed()
    with ExitStack() as stack:
        for program in PROGRAMS:
            try:
                link = syscall.pinned(folder / program.name)
            except FileNotFoundError:
                continue
            stack.callback(os.close, link)
            info = syscall.link_info(link)
            found.links[program.name] = Attached(program, link, info)
            code = syscall.program_by_id(info.program)
            stack.callback(os.close, code)
            for descriptor in syscall.maps_of(code):
                stack.callback(os.close, descriptor)
                shape = syscall.map_info(descriptor)
                if shape.name == "settings":
                    found.settings[program.name] = shape.number
                if shape.name in MAPS:
                    found.maps.setdefault(shape.name, descriptor)
        yield found


def _announce_namespace() -> None:
    """Let getsockopt see a socket of this namespace: sk_lookup needs the kernel's name for it.

    Without it nobody knows which addresses are the host's own, and what it opens itself, and rules redirect that are
    about to go, is taken for what arrives.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as any_socket, suppress(OSError):
        any_socket.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)


def targets(place: Place, cgroup: Cgroup | None, inode: int) -> Mapping[Scope, int]:
    """What each scope's links should report as attached to: a cgroup's id is its directory's inode number.

    Raises OSError when the cgroup is gone.
    """
    return {
        Scope.APPLICATIONS: place.applications(cgroup).stat().st_ino,
        Scope.DATA_PLANE: place.top.stat().st_ino,
        Scope.NAMESPACE: inode,
    }


class Switch:
    """Puts loaded programs in the place of whatever is pinned, one atomic step a program; undoes on failure."""

    def __init__(self, place: Place, cgroup: Cgroup | None, inode: int) -> None:
        self.place = place
        self.cgroup = cgroup
        self.folder = place.folder
        self.targets = targets(place, cgroup, inode)
        self.superseded: list[int] = []
        """Links of another cgroup, to be detached when all the new ones are there."""

    def run(self, loaded: Mapping[str, int], before: Installed) -> None:
        """Attach the programs (descriptors by name). Raises ApplyError; everything is then as before."""
        with ExitStack() as undo:
            for program in (one for one in PROGRAMS if one.name in loaded):
                try:
                    self._put(program, loaded[program.name], before.links.get(program.name), undo)
                    if program.name == "getsockopt":
                        _announce_namespace()
                except OSError as error:
                    raise ApplyError(
                        f"the kernel refused to attach the eBPF program {program.name} to {program.scope.value}: "
                        f"{error.strerror}. {_undone(undo)}"
                    ) from error
            undo.pop_all()
            for link in self.superseded:
                with suppress(OSError):
                    syscall.detach(link)

    def _put(self, program: Program, code: int, old: Attached | None, undo: ExitStack) -> None:
        if old and old.info.target == self.targets[program.scope]:
            syscall.replace(old.link, code)
            undo.callback(_put_back, old)
            return
        link = self._attach(program, code)
        try:
            self._pin(program, link, old, undo)
        finally:
            os.close(link)

    def _pin(self, program: Program, link: int, old: Attached | None, undo: ExitStack) -> None:
        """Pin a new link under its name. An old one (of another cgroup, or of a dead namespace) goes only after."""
        final, temporary = self.folder / program.name, self.folder / f"{program.name}{_NEXT}"
        temporary.unlink(missing_ok=True)
        try:
            syscall.pin(link, temporary)
            if old:
                # Its descriptor keeps it attached until the whole switch is done.
                final.unlink()
                undo.callback(syscall.pin, old.link, final)
                self.superseded.append(old.link)
            temporary.rename(final)
        except BaseException:
            syscall.detach(link)  # whatever is pinned now does nothing
            temporary.unlink(missing_ok=True)
            raise
        undo.callback(unpin, self.folder, (program.name,))

    def _attach(self, program: Program, code: int) -> int:
        place = {
            Scope.APPLICATIONS: self.place.applications(self.cgroup),
            Scope.DATA_PLANE: self.place.top,
            Scope.NAMESPACE: Path("/proc/thread-self/ns/net"),
        }[program.scope]
        target = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return syscall.attach(code, target, program.attach_type)
        finally:
            os.close(target)


def _undone(undo: ExitStack) -> str:
    """Undo, and say what the state is now."""
    try:
        undo.close()
    except OSError as failed:
        return (
            f"Taking the others back failed in part: {failed.strerror}. Run `tpctl uninstall`, then look at "
            "`tpctl status`"
        )
    return "The programs are as they were before"


def _put_back(old: Attached) -> None:
    code = syscall.program_by_id(old.info.program)
    try:
        syscall.replace(old.link, code)
    finally:
        os.close(code)


def unpin(folder: Path, names: tuple[str, ...]) -> None:
    """Detach pinned programs and remove the pins; those that are not there are passed over.

    Raises OSError for the first that did not go; the others went.
    """
    failed: OSError | None = None
    for path in (folder / f"{name}{ending}" for name in names for ending in ("", _NEXT)):
        try:
            _unpin(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            failed = failed or error
    if failed:
        raise failed


def _unpin(path: Path) -> None:
    link = syscall.pinned(path)
    try:
        syscall.detach(link)
    finally:
        os.close(link)
        path.unlink(missing_ok=True)


def is_dead(folder: Path) -> bool:
    """Whether the network namespace of a folder of pins is gone: the kernel then took its sk_lookup link apart."""
    try:
        link = syscall.pinned(folder / "sk_lookup")
    except OSError:
        return False
    try:
        return syscall.link_info(link).target == 0
    except OSError:
        return False
    finally:
        os.close(link)


def clear_dead(place: Place) -> tuple[str, ...]:
    """Remove what namespaces that no longer exist left behind; hands back their folders' names."""
    cleared = []
    for folder in place.folders():
        if is_dead(folder):
            unpin(folder, tuple(program.name for program in PROGRAMS))
            with suppress(OSError):
                folder.rmdir()
            cleared.append(folder.name)
    return tuple(cleared)

"""systemd's units: put where the administrator's own units lie, enabled, and taken away again.

`root` is where the host's file system is mounted; another one than / is an image that is being built, on which nothing
runs. Unit files come with the package and are written with the path of the command that installs them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import resources
from pathlib import Path

from agent import runner
from agent.errors import ApplyError, HostError, InputError
from agent.persist import files

ROOT = Path("/")
UNITS = Path("etc/systemd/system")
CONFIG = Path("etc/tpctl/config.yaml")
SERVICE, RELAY, RELAY_SOCKET = "tpctl.service", "tpctl-relay.service", "tpctl-relay.socket"
DROP_IN = "kuma-dp.service.d/10-tpctl.conf"
WANTED = "multi-user.target.wants"
SHIPPED_COMMAND = "/usr/bin/tpctl"
"""The path in the unit files as they are shipped."""
RUNTIME_UNITS = Path("run/systemd/system")
PLACES = (UNITS, RUNTIME_UNITS, Path("usr/local/lib/systemd/system"), Path("usr/lib/systemd/system"),
          Path("lib/systemd/system"))  # fmt: skip
"""systemd.unit(5), the strongest first."""
FILE_MODE = 0o644


def install(root: Path = ROOT, *, command: str | None = None) -> tuple[str, ...]:
    """Write and enable the units; says what was done, a line each. Writing them again changes nothing.

    Raises InputError when there is no configuration to install from, HostError when the host has no systemd.
    """
    if not (root / CONFIG).is_file():
        raise InputError(
            f"/{CONFIG} does not exist, and it is what the unit installs from; write it first, for instance with "
            f"`tpctl install FLAGS --print-config > /{CONFIG}`"
        )
    if not any((root / place / "multi-user.target").exists() for place in PLACES):
        raise HostError(f"there is no systemd below {root}")
    path = command or own_path()
    names = [SERVICE, RELAY, RELAY_SOCKET, *([DROP_IN] if kuma_dp_exists(root) else [])]
    _refuse_links(root, names)
    done = [_write(root, name, path) for name in names]
    done.append(_enable(root))
    reload(root)
    return tuple(line for line in done if line)


def remove(root: Path = ROOT, *, dry_run: bool = False) -> tuple[str, ...]:
    """Take away every unit, link and drop-in of ours; says what went. Raises ApplyError."""
    folder = root / UNITS
    links = [WANTED + "/" + SERVICE, WANTED + "/" + RELAY, f"sockets.target.wants/{RELAY_SOCKET}"]
    ours = [folder / name for name in (*links, SERVICE, RELAY, RELAY_SOCKET, DROP_IN)]
    running = {unit for unit in (RELAY, RELAY_SOCKET) if root == ROOT and _is_active(unit)}
    ours += [root / RUNTIME_UNITS / unit for unit in (RELAY, RELAY_SOCKET) if unit not in running]
    there = [path for path in ours if (path.is_symlink() or path.exists()) and not _is_mask(path)]
    if not dry_run:
        for name in (SERVICE, RELAY, RELAY_SOCKET, DROP_IN):
            with suppress(OSError):  # nobody reads them
                files.clear_leftovers(folder / name)
    if dry_run or not there:
        return tuple(map(str, there))
    for path in there:
        if path.name in running and path.parent == folder:
            _keep_until_reboot(path)
        files.remove(path)
    drop_ins = (folder / DROP_IN).parent
    if drop_ins.is_dir() and not any(drop_ins.iterdir()):
        drop_ins.rmdir()
    reload(root)
    return tuple(map(str, there))


def _refuse_links(root: Path, names: Iterable[str]) -> None:
    """Raise HostError where there is a link, as `systemctl mask` makes one: nothing is written through it."""
    links = [root / UNITS / name for name in names if (root / UNITS / name).is_symlink()]
    if links:
        raise HostError(
            "; ".join(
                f"{link} is {'masked' if _is_mask(link) else 'a symbolic link'}, not a unit file of tpctl's: "
                + (f"run `systemctl unmask {link.name}`" if _is_mask(link) else "remove it")
                + " first"
                for link in links
            )
        )


def _is_mask(path: Path) -> bool:
    return path.is_symlink() and path.readlink() == Path(os.devnull)


def _is_active(unit: str) -> bool:
    if not Path("/run/systemd/system").is_dir():
        return False
    try:
        return runner.run(["systemctl", "is-active", "--quiet", unit]).ok
    except FileNotFoundError:
        return False


def _keep_until_reboot(path: Path) -> None:
    """Leave a running service its definition: without it systemd hears neither its watchdog nor its end."""
    copy = ROOT / RUNTIME_UNITS / path.name
    content = files.read(path)
    assert content is not None
    copy.parent.mkdir(parents=True, exist_ok=True)
    files.replace(copy, content, mode=FILE_MODE)


def is_enabled(root: Path = ROOT) -> bool:
    """Whether a boot will start the service."""
    linked = any((root / place / WANTED / SERVICE).is_symlink() for place in PLACES)
    return (
        linked
        and not any(_is_mask(root / place / SERVICE) for place in PLACES)
        and any((root / place / SERVICE).exists() for place in PLACES)
    )


def has_drop_in(root: Path = ROOT) -> bool:
    """Whether a start of kuma-dp installs the redirection."""
    return (root / UNITS / DROP_IN).exists()


def kuma_dp_exists(root: Path = ROOT) -> bool:
    """Whether the host has a kuma-dp.service."""
    return any((root / place / "kuma-dp.service").exists() for place in PLACES)


def own_path() -> str:
    """The absolute path of the `tpctl` that runs. Raises HostError when there is none that a unit could call."""
    asked = Path(sys.argv[0])
    candidates = [asked if asked.name == "tpctl" else None, Path(sys.executable).with_name("tpctl")]
    for candidate in candidates:
        if candidate and candidate.is_absolute() and candidate.is_file():
            return str(candidate)
    found = shutil.which("tpctl", path=runner.SEARCH_PATH)
    if not found:
        raise HostError("the tpctl command is not installed where a unit could call it")
    return found


def unit_text(name: str, command: str) -> str:
    """A unit file as it is installed."""
    text = resources.files("agent.persist").joinpath("units", *name.split("/")).read_text(encoding="utf-8")
    text = text.replace(SHIPPED_COMMAND, command)
    if command.startswith(("/home/", "/root/")):  # it could not run the command otherwise
        text = text.replace("ProtectHome=yes", "ProtectHome=read-only")
    return text


def _write(root: Path, name: str, command: str) -> str | None:
    path, text = root / UNITS / name, unit_text(name, command).encode()
    if files.read(path) == text:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ApplyError(f"{path.parent} cannot be made: {error.strerror}") from error
    files.replace(path, text, mode=FILE_MODE)
    return f"wrote {path}"


def _enable(root: Path) -> str | None:
    link, target = root / UNITS / WANTED / SERVICE, Path("/") / UNITS / SERVICE
    if link.is_symlink() and link.readlink() == target:
        return None
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        files.sync_folder(link.parent)
    except OSError as error:
        raise ApplyError(f"{link} cannot be made: {error.strerror}") from error
    return f"enabled {SERVICE}"


def reload(root: Path = ROOT) -> None:
    """Let a running systemd see the change."""
    if root != ROOT or not Path("/run/systemd/system").is_dir():
        return
    try:
        done = runner.run(["systemctl", "daemon-reload"])
    except FileNotFoundError:
        return
    if not done.ok:
        raise ApplyError(f"the units are in place, but systemd does not know of it: {done.failure()}")

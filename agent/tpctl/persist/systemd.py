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

from tpctl.persist import files, image, neighbours, watch
from tpctl.persist.image import shown, within
from tpctl.system import runner
from tpctl.system.errors import ApplyError, HostError, InputError

ROOT = Path("/")
UNITS = Path("etc/systemd/system")
CONFIG = Path("etc/tpctl/config.yaml")
SERVICE, RELAY, RELAY_SOCKET = "tpctl.service", "tpctl-relay.service", "tpctl-relay.socket"
ENVOY = "tpctl-envoy.service"
ENVOY_CONFIG = Path("etc/tpctl/envoy.yaml")
DATA_PLANES = (RELAY, RELAY_SOCKET, ENVOY)
"""Units that go on running when they are taken away, so that their connections can finish."""
DROP_IN = "kuma-dp.service.d/10-tpctl.conf"
WANTED = "multi-user.target.wants"
SHIPPED_COMMAND = "/usr/bin/tpctl"
"""The path in the unit files as they are shipped."""
FLEETING = ("/tmp", "/var/tmp", "/run", "/dev")  # noqa: S108 - nothing is written there
RUNTIME_UNITS = Path("run/systemd/system")
PLACES = (UNITS, RUNTIME_UNITS, Path("usr/local/lib/systemd/system"), Path("usr/lib/systemd/system"),
          Path("lib/systemd/system"))  # fmt: skip
"""systemd.unit(5), the strongest first."""
FILE_MODE = 0o644


def install(
    root: Path = ROOT, *, command: str | None = None, resolv_conf: str = watch.RESOLV_CONF, envoy: bool = False
) -> tuple[str, ...]:
    """Write and enable the units; says what was done, a line each. Writing them again changes nothing.

    `command` is the path of the tpctl that they call, as the system in `root` sees it; by default the one that runs, or
    that of the image. `resolv_conf` is the file whose changes the redirection of DNS follows; it is watched from now
    on. With `envoy`, the next boot starts Envoy, too; its unit is renewed wherever it is.

    Raises InputError when there is no configuration to install from, or no such command, HostError when the host has no
    systemd.
    """
    if root == ROOT:
        _refuse_fleeting(command or own_path())
    if not within(root, CONFIG).is_file():
        where = shown(root, CONFIG)
        raise InputError(
            f"{where} does not exist, and it is what the unit installs from; write it first, for instance with "
            f"`tpctl install FLAGS --print-config > {where}`"
        )
    if not any(within(root, place / "multi-user.target").exists() for place in PLACES):
        raise HostError(f"there is no systemd below {root}")
    if envoy:
        _require_envoy_can_run(root)
    path = _command_of(root, command)
    _refuse_fleeting(path)
    names = [
        SERVICE,
        *watch.UNITS,
        neighbours.SERVICE,
        RELAY,
        RELAY_SOCKET,
        *([DROP_IN] if kuma_dp_exists(root) else []),
        *([ENVOY] if envoy or _unit(root, ENVOY).exists() else []),
    ]
    _refuse_links(root, names)
    watched = watch.chain(resolv_conf, root)
    done = [_write(root, name, path, watched) for name in names]
    done += [_enable(root, SERVICE, f"{WANTED}/{SERVICE}"), _enable(root, watch.PATH, watch.LINK)]
    if envoy:
        done.append(_enable(root, ENVOY, f"{WANTED}/{ENVOY}"))
    done += list(dict.fromkeys(_enable(root, neighbours.SERVICE, link) for link in neighbours.links()))
    reload(root)
    if root == ROOT and any(done):
        _systemctl("restart", watch.PATH)
    return tuple(line for line in done if line)


def _require_envoy_can_run(root: Path) -> None:
    """Raise InputError when Envoy would have nothing to serve, or somebody else has its ports."""
    if not within(root, ENVOY_CONFIG).is_file():
        raise InputError(f"--envoy: {shown(root, ENVOY_CONFIG)} does not exist, and it is what the unit serves")
    if _unit(root, f"sockets.target.wants/{RELAY_SOCKET}").is_symlink():
        raise InputError(
            f"--envoy: {RELAY_SOCKET} is enabled, and has the ports that Envoy needs: run "
            f"`{_systemctl_for(root)} disable {RELAY_SOCKET}` first"
        )


def _unit(root: Path, name: str) -> Path:
    """Where a unit of the administrator's, or a link to one, lies in an image. What is a link there stays one."""
    return within(root, UNITS / name, follow=False)


def _command_of(root: Path, named: str | None) -> str:
    """The tpctl that units call. Raises InputError when there is none."""
    if named is not None:
        _word(named)
        why = image.cannot_run(root, named) if named.startswith("/") else "it is not an absolute path"
        if why:
            raise InputError(f"--command {named}: {why}")
        return named
    if root == ROOT:
        return own_path()
    candidates = [f"{folder}/tpctl" for folder in runner.SEARCH_PATH.split(":")]
    for candidate in candidates:
        if image.cannot_run(root, candidate) is None:
            return candidate
    there = [candidate for candidate in candidates if within(root, candidate).exists()]
    why = f"{image.cannot_run(root, there[0])}" if there else f"looked in {runner.SEARCH_PATH}"
    raise InputError(
        f"there is no tpctl in {root} that its units could call ({why}): install it there first, or name it with "
        "--command, by its path in the image"
    )


def remove(root: Path = ROOT, *, dry_run: bool = False) -> tuple[str, ...]:
    """Take away every unit, link and drop-in of ours; says what went. Raises ApplyError."""
    links = [f"{WANTED}/{SERVICE}", watch.LINK, f"{WANTED}/{RELAY}", f"sockets.target.wants/{RELAY_SOCKET}"]
    links += [f"{WANTED}/{ENVOY}", *neighbours.links()]
    units = (SERVICE, *watch.UNITS, neighbours.SERVICE, *DATA_PLANES, DROP_IN)
    ours = [_unit(root, name) for name in (*links, *units)]
    running = {unit for unit in DATA_PLANES if root == ROOT and _is_active(unit)}
    ours += [within(root, RUNTIME_UNITS / unit, follow=False) for unit in DATA_PLANES if unit not in running]
    there = [path for path in ours if (path.is_symlink() or path.exists()) and not _is_mask(path)]
    if not dry_run:
        for name in units:
            with suppress(OSError):  # nobody reads them
                files.clear_leftovers(_unit(root, name))
    if dry_run or not there:
        return tuple(map(str, there))
    if root == ROOT and _unit(root, watch.PATH) in there:
        with suppress(ApplyError):  # systemd may not know it yet
            _systemctl("stop", watch.PATH)
    for path in there:
        if path in {_unit(root, unit) for unit in running}:
            _keep_until_reboot(path)
        files.remove(path)
    for left in {_unit(root, name).parent for name in (DROP_IN, watch.LINK, *neighbours.links())}:
        if left.is_dir() and not any(left.iterdir()):
            left.rmdir()
    reload(root)
    return tuple(map(str, there))


def _refuse_links(root: Path, names: Iterable[str]) -> None:
    """Raise HostError where there is a link, as `systemctl mask` makes one: nothing is written through it."""
    links = [path for name in names if (path := _unit(root, name)).is_symlink()]
    if links:
        raise HostError(
            "; ".join(
                f"{link} is {'masked' if _is_mask(link) else 'a symbolic link'}, not a unit file of tpctl's: "
                + (f"run `{_systemctl_for(root)} unmask {link.name}`" if _is_mask(link) else "remove it")
                + " first"
                for link in links
            )
        )


def _systemctl_for(root: Path) -> str:
    return "systemctl" if root == ROOT else f"systemctl --root={root}"


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


def is_enabled(root: Path = ROOT, unit: str = SERVICE) -> bool:
    """Whether a boot will start the service, or another unit."""
    linked = any(within(root, place / WANTED / unit, follow=False).is_symlink() for place in PLACES)
    return (
        linked
        and not any(_is_mask(within(root, place / unit, follow=False)) for place in PLACES)
        and any(within(root, place / unit).exists() for place in PLACES)
    )


def has_drop_in(root: Path = ROOT) -> bool:
    """Whether a start of kuma-dp installs the redirection."""
    return within(root, UNITS / DROP_IN).exists()


def kuma_dp_exists(root: Path = ROOT) -> bool:
    """Whether the host has a kuma-dp.service."""
    return any(within(root, place / "kuma-dp.service").exists() for place in PLACES)


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


def _refuse_fleeting(command: str) -> None:
    """Raise HostError for a command where the units find nothing: hidden by PrivateTmp=, or gone at the next boot."""
    for place in FLEETING:
        if Path(command).is_relative_to(place):
            raise HostError(
                f"units cannot run {command}: anything below {place} is hidden from them, or gone after a reboot; "
                "install tpctl elsewhere, for instance in a virtual environment below /opt"
            )


def _word(path: str) -> str:
    """A path as the first word of a command line in a unit file; systemd.service(5), systemd.unit(5).

    Raises HostError for what systemd takes for no program's name (string_is_safe in src/basic/string-util.c).
    """
    if not path.isprintable() or set(path) & set("\"'\\"):
        raise HostError(f"a unit file cannot name {path!r}; install tpctl under another path")
    path = path.replace("%", "%%")
    return f'"{path}"' if set(path) & set(" ;") else path


def unit_text(name: str, command: str, watched: tuple[str, ...] = ()) -> str:
    """A unit file as it is installed. Raises HostError for a path that it cannot hold."""
    text = resources.files("tpctl.persist").joinpath("units", *name.split("/")).read_text(encoding="utf-8")
    text = text.replace(SHIPPED_COMMAND, _word(command))
    if command.startswith(("/home/", "/root/")):  # it could not run the command otherwise
        text = text.replace("ProtectHome=yes", "ProtectHome=read-only")
    return watch.naming(text, watched)


def _write(root: Path, name: str, command: str, watched: tuple[str, ...]) -> str | None:
    path, text = _unit(root, name), unit_text(name, command, watched).encode()
    if files.read(path) == text:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ApplyError(f"{path.parent} cannot be made: {error.strerror}") from error
    files.replace(path, text, mode=FILE_MODE)
    return f"wrote {path}"


def _enable(root: Path, unit: str, place: str) -> str | None:
    link, target = _unit(root, place), Path("/") / UNITS / unit
    if link.is_symlink() and link.readlink() == target:
        return None
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        files.sync_folder(link.parent)
    except OSError as error:
        raise ApplyError(f"{link} cannot be made: {error.strerror}") from error
    return f"enabled {unit}" if root == ROOT else f"enabled {unit} in {root}"


def reload(root: Path = ROOT) -> None:
    """Let a running systemd see the change."""
    if root == ROOT:
        _systemctl("daemon-reload")


def _systemctl(*words: str) -> None:
    """Tell a running systemd. Raises ApplyError when it refuses."""
    if not Path("/run/systemd/system").is_dir():
        return
    try:
        done = runner.run(["systemctl", *words])
    except FileNotFoundError:
        return
    if not done.ok:
        raise ApplyError(f"the units are in place, but systemd does not know of it: {done.failure()}")

"""A file of sysctl.d(5) that keeps the data plane's ports from becoming source ports of outgoing connections.

net.ipv4.ip_local_reserved_ports is one list, and the last file that sets it wins. So ours, which is read last, repeats
what the others set; and the running kernel's list is added to, not replaced. The file remembers which ports it added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tpctl.host import local_ports
from tpctl.host.local_ports import RESERVED, SYSCTLS, listing, merged, parse_ports, without
from tpctl.host.proc import in_first_namespace
from tpctl.persist import files
from tpctl.persist.image import within
from tpctl.spec.policy import PortRange, Ports, includes
from tpctl.system import text
from tpctl.system.errors import ApplyError

FILE = Path("etc/sysctl.d/99-tpctl.conf")
"""Behind 99-sysctl.conf, which is /etc/sysctl.conf."""
_FOLDERS = ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d", "lib/sysctl.d")
"""The strongest first: of files of the same name, only the first is read."""
_MAIN = "etc/sysctl.conf"
"""Read by sysctl(8) alone, unless it is linked to."""
_SETTING = re.compile(r"-?net[./]ipv4[./]ip_local_reserved_ports\s*=\s*(.*?)\s*", re.ASCII)
_ADDED = "# added: "
_MODE = 0o644
_HEAD = """\
# Written by `tpctl persist --reserve-ports`, and removed by `tpctl persist --remove`: no outgoing connection gets a
# port of the data plane as its source port, which would keep the data plane from listening there. The last file that
# sets the list wins, so this one repeats what other files set. Run the command again when those have changed.
"""


def reserve(root: Path, ports: Iterable[int]) -> tuple[str, ...]:
    """Write the file, and let the running kernel know; says what was done, a line each. Raises ApplyError."""
    wanted = tuple(PortRange(port) for port in sorted(set(ports)))
    path = within(root, FILE)
    others = _of_others(root)
    running = _running() if _is_here(root) else ()
    ours = _added(path)
    held = merged(others, without(running, (one.first for one in ours)))
    added = tuple(one for one in wanted if not includes(held, one.first))
    content = f"{_HEAD}{_ADDED}{listing(added)}\nnet.ipv4.{RESERVED} = {listing(merged(others, wanted))}\n".encode()
    done = []
    if files.read(path) != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, content, mode=_MODE)
        done.append(f"wrote {path}")
    if _is_here(root):
        dropped = (one.first for one in ours if not includes(merged(others, wanted), one.first))
        done += _set(running, merged(without(running, dropped), wanted))
    return tuple(done)


def release(root: Path, *, dry_run: bool = False) -> tuple[str, ...]:
    """Take away the file, and its ports from the running kernel's list; says what went. Raises ApplyError."""
    path = within(root, FILE)
    ours = _added(path)
    if not path.exists():
        return ()
    if not dry_run:
        files.remove(path)
        if _is_here(root):
            running = _running()
            _set(running, without(running, (one.first for one in ours)))
    return (str(path),)


def _is_here(root: Path) -> bool:
    return root == Path("/") and in_first_namespace()


def _running() -> Ports:
    return local_ports.local_ports().reserved


def _set(before: Ports, after: Ports) -> list[str]:
    if before == after:
        return []
    try:
        (SYSCTLS / RESERVED).write_text(f"{listing(after)}\n")
    except OSError as error:
        raise ApplyError(f"net.ipv4.{RESERVED} cannot be set to {listing(after)}: {error.strerror}") from error
    return [f"net.ipv4.{RESERVED} is {listing(after) or 'empty'} now"]


def _added(path: Path) -> Ports:
    content = files.read(path)
    for line in text.lines(text.decoded(content or b"")):
        if line.startswith(_ADDED):
            return _ports(line.removeprefix(_ADDED))
    return ()


def _of_others(root: Path) -> Ports:
    """What the other files come to: the last that sets it, in the order of their names."""
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        for path in within(root, folder).glob("*.conf"):
            found.setdefault(path.name, path)
    found.pop(FILE.name, None)
    value = _setting(within(root, _MAIN))
    for name in sorted(found):
        set_here = _setting(within(root, Path("/") / found[name].relative_to(root)))
        value = value if set_here is None else set_here
    return value or ()


def _setting(path: Path) -> Ports | None:
    """What a file sets, if it does; sysctl.d(5): comments begin with # or ;, and the last line wins."""
    content = files.read(path) if path.is_file() else None
    lines = (line.strip(" \t\r") for line in text.lines(text.decoded(content or b"")))
    values = [match[1] for line in lines if (match := _SETTING.fullmatch(line))]
    return _ports(values[-1]) if values else None


def _ports(value: str) -> Ports:
    """Of what somebody wrote; the kernel refuses what is no list of ports."""
    try:
        return merged(parse_ports(value))
    except ValueError:
        return ()

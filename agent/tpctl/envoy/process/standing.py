"""How a running Envoy stands, as its supervisor writes it down and `tpctl status` reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from tpctl.config.values import BadValueError
from tpctl.envoy.documents import CLUSTERS, LISTENERS
from tpctl.envoy.process import asking
from tpctl.envoy.process.admin import Admin, AdminError, Certificate
from tpctl.envoy.process.folder import is_held
from tpctl.relay.connections.certificates import SOON_DAYS, decoded
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.check import MAX_LISTENERS
from tpctl.relay.settings.listen import read_address
from tpctl.system.errors import TpctlError
from tpctl.system.input_files import UnusableFileError, read_bytes

FILE = "state.json"
_MAX_BYTES = 4 * 1024 * 1024


@dataclass(slots=True)
class Standing:
    """What the supervisor knows."""

    file: str
    """The configuration."""
    admin: str
    """The path of the admin interface's socket."""
    network: int = 0
    """The inode of the network namespace."""
    supervisor: int = 0
    envoy: int = 0
    """Pids; 0 while there is no Envoy."""
    starts: int = 0
    """How often Envoy was started."""
    versions: dict[str, str] = field(default_factory=dict)
    """What it should have, by the names of the files of listeners and clusters."""
    refused: int = 0
    """How many updates Envoy has refused."""
    problems: list[str] = field(default_factory=list)
    """Why it does not serve what the file says."""
    restart: bool = False
    """Whether a change takes effect with the next start only."""
    connections: int = 0
    """The most that it accepts at the same time."""
    originals: dict[str, str] = field(default_factory=dict)
    """The paths of certificates, keys and secrets by those of the copies that Envoy reads."""
    dns: list[str] = field(default_factory=list)
    """Where DNS is answered beside Envoy."""
    dns_asked: list[str] = field(default_factory=list)
    """At which addresses this host can ask."""
    dns_pid: int = 0
    """Of the process that answers; 0 while there is none."""
    dns_starts: int = 0

    def written(self) -> bytes:
        """As it is written down."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Found:
    """What `tpctl status` tells of an Envoy."""

    standing: Standing
    serves: bool
    """Whether Envoy answers, and has every version that it should have."""
    problems: tuple[str, ...]
    answers: bool = True
    """Whether DNS is answered, where it should be."""
    documents: tuple[tuple[str, str], ...] = (("CDS", CLUSTERS), ("LDS", LISTENERS))
    """What Envoy calls the documents, and the names of their files."""


def look(folder: Path) -> Found | None:
    """The Envoy of a folder; None when there is none, or it belongs to another network namespace."""
    try:
        if not is_held(folder):
            return _left(folder)
        standing = _read(folder)
    except OSError:
        return None
    if standing is None:
        return None
    if standing.network != network():
        return None
    problems, of_dns = list(_problems(standing)), list(_dns_problems(standing, folder.lstat().st_uid))
    return Found(standing, not problems, (*problems, *of_dns, *_expiring(standing)), not of_dns)


def network() -> int:
    """What tells this network namespace from others."""
    return os.stat("/proc/thread-self/ns/net").st_ino  # noqa: PTH116


def _left(folder: Path) -> Found | None:
    """Of a supervisor that has gone without a word: one that ends as it should takes its state along."""
    standing = _read(folder)
    if standing is None or standing.network != network():
        return None
    problem = f"the tpctl envoy run that served {standing.file} has ended unexpectedly"
    return Found(standing, False, (problem,), not standing.dns)


def _read(folder: Path) -> Standing | None:
    try:
        found = json.loads(read_bytes(folder / FILE, _MAX_BYTES))
        # That of an earlier version, which runs until it is restarted, does not have all of them.
        known = Standing(**{one.name: found[one.name] for one in fields(Standing) if one.name in found})
    except (OSError, UnusableFileError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # It is a file of the data plane's user, who is believed no more than that: what he writes is shown.
    empty = Standing("", "")
    if all(type(getattr(known, one.name)) is type(getattr(empty, one.name)) for one in fields(Standing)):
        for name in ("problems", "dns", "dns_asked"):
            setattr(known, name, [str(one) for one in getattr(known, name)])
        known.versions = {str(name): str(one) for name, one in known.versions.items()}
        return known
    return None


def _problems(standing: Standing) -> Iterator[str]:
    yield from (f"{standing.file} is not what Envoy serves: {problem}" for problem in standing.problems)
    if standing.restart:
        yield (
            f"a change of {standing.file} takes effect when Envoy is restarted: `systemctl restart tpctl-envoy`, or "
            "end `tpctl envoy run` and start it again"
        )
    if not standing.envoy:
        yield "Envoy does not run; its log tells why"
        return
    try:
        figures = Admin(Path(standing.admin)).figures()
    except AdminError as error:
        yield f"Envoy (pid {standing.envoy}) does not answer: {error}"
        return
    for name, what in ((CLUSTERS, "clusters (CDS)"), (LISTENERS, "listeners (LDS)")):
        has, should = figures.versions.get(name, ""), standing.versions.get(name, "")
        if has != should:
            yield f"Envoy has {f'version {has}' if has else 'none'} of the {what}, and should have {should}"
    if figures.warming:
        yield f"{figures.warming} of Envoy's listeners wait for a secret or cluster, and do not serve yet"


def _dns_problems(standing: Standing, uid: int) -> Iterator[str]:
    """What is wrong with DNS. It is asked as the data plane's user, whose folder this is."""
    if standing.dns and not standing.dns_pid:
        yield f"nobody answers DNS at {', '.join(standing.dns)}: the process has died, and its log tells why"
        return
    try:
        asked = [read_address(one) for one in standing.dns_asked[:MAX_LISTENERS]]
        quiet = asking.silent([one for one in asked if isinstance(one, Destination)], uid) if asked else []
    except (TpctlError, BadValueError) as error:
        yield str(error)
        return
    yield from (f"pid {standing.dns_pid} does not answer DNS at {one}" for one in quiet)


def _expiring(standing: Standing) -> Iterator[str]:
    try:
        certificates = Admin(Path(standing.admin)).certificates() if standing.envoy else []
    except AdminError:
        return
    soon = [one for one in dict.fromkeys(certificates) if one.days < SOON_DAYS]
    files = _files(standing) if soon else {}
    for one in soon:
        days = "today" if one.days < 1 else f"in {one.days} day{'s' if one.days > 1 else ''}"
        yield f"the certificate {_called(one, files)} expires {days}, at {one.expires}"


def _called(certificate: Certificate, files: Mapping[int, str]) -> str:
    file = files.get(certificate.serial, f"of serial number {certificate.serial:X}")
    return f"{file} ({', '.join(certificate.names)})" if certificate.names else file


def _files(standing: Standing) -> dict[int, str]:
    """The administrator's files by the serial number of the first certificate in each.

    Envoy does not say which file a certificate is from.
    """
    found = {}
    for copy, original in standing.originals.items():
        certificate = decoded(Path(copy))
        if certificate is not None:
            found[int(certificate["serialNumber"], 16)] = original
    return found

"""The files that settings name, and what is in them: everything that Envoy looks at late, or not at all."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tpctl.envoy.documents import Places
from tpctl.envoy.secrets import secret_path
from tpctl.host.users import uid_of
from tpctl.relay.connections import certificates, tls
from tpctl.relay.connections.routes import is_surely_local
from tpctl.relay.dns.local import read_zone
from tpctl.relay.settings.model import ListenerSettings, Service, Settings, Upstream
from tpctl.relay.settings.trusted_files import group_of, named_files, require_file, untrusted
from tpctl.relay.settings.upstream import named_upstreams
from tpctl.system.child import in_child
from tpctl.system.errors import InputError
from tpctl.system.input_files import UnusableFileError, read_bytes

MAX_SECRET = 4096
"""Bytes: it is the value of a header, and all headers together have 60 KiB."""
_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
            "/etc/ssl/cert.pem")  # fmt: skip
"""Debian, Fedora, openSUSE, Alpine."""


@dataclass(slots=True)
class Findings:
    """What is wrong with files, a line for each."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def host_authorities() -> Path:
    """The file of the authorities that this host trusts; where there is none, the name that it has on Debian."""
    return next((Path(path) for path in _BUNDLES if Path(path).is_file()), Path(_BUNDLES[0]))


def here(settings: Settings) -> frozenset[str]:
    """The upstreams that are addresses of this host."""
    upstreams: list[Upstream] = []
    for listener in settings.listeners:
        upstreams += [listener.upstream, *(service.upstream for service in listener.services)]
    return frozenset(one.host for upstream in upstreams for one in named_upstreams(upstream) if is_surely_local(one))


def look(settings: Settings, places: Places) -> Findings:
    """Look at every file. As root, those that others may change, and secrets that they may read, are refused."""
    found = Findings(list(untrusted(settings)))
    for listener in settings.listeners:
        _look_at_tls(found, f"listener {listener.name}: ", listener, places)
        for service in listener.services:
            place = f"listener {listener.name}: service {service.name}: "
            _look_at_tls(found, place, service, places)
            if service.jwt is not None and service.jwt.jwks_ca_file is not None:
                found.problems += (
                    f"{place}jwt.{line}" for line in tls.authorities_problems("jwks_ca_file", service.jwt.jwks_ca_file)
                )
    for name, secret in settings.secrets.items():
        if secret.file is not None or places.credentials is not None:
            what = "file" if secret.file is not None else "credential"
            found.problems += (f"secrets.{name}.{what}: {line}" for line in _secret(secret_path(secret, places)))
    found.problems += _of_dns(settings)
    if not found.problems:
        found.problems += _unreadable(settings)
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _of_dns(settings: Settings) -> Iterator[str]:
    try:
        require_file(settings)
        zone = read_zone(settings.dns)
    except InputError as error:
        yield from error.problems
        return
    if zone is not None and zone.vips.by_host:
        yield (
            f"dns.zone_file: {settings.dns.zone_file} has virtual addresses (upstreams), and only `tpctl relay` "
            "connects to what is behind them; give these names addresses of their own"
        )


def _unreadable(settings: Settings) -> Iterator[str]:
    """Files that root can read, but not the user as whom Envoy runs. Tried, not reckoned: ACLs count as well."""
    uid = uid_of(settings.user) if settings.user is not None else None
    if os.geteuid() != 0 or not uid:
        return
    entry = pwd.getpwuid(uid)
    files = list(named_files(settings))

    def attempt() -> str:
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(uid, uid, uid)
        return " ".join(str(number) for number, (_, path, _) in enumerate(files) if not os.access(path, os.R_OK))

    what, why = f"{entry.pw_name} has not read the files of the configuration", "and nothing was changed"
    for number in in_child(attempt, what=what, why=why).split():
        where, path, is_secret = files[int(number)]
        remedy = f"chown root:{group_of(uid)} {path} && chmod 0640 {path}" if is_secret else f"chmod a+r {path}"
        yield (
            f"{where}: {path} cannot be read by {entry.pw_name}, as whom Envoy runs: {remedy}, "
            "and let that user enter the folders above it"
        )


def _look_at_tls(found: Findings, place: str, what: ListenerSettings | Service, places: Places) -> None:
    problems = [f"{place}{line}" for line in tls.problems(what.ssl, what.upstream_tls)]
    found.problems += problems
    for section in ("ssl", "upstream_tls"):
        own = getattr(what, section)
        key = f"{place}{section}.certificate"  # that of its private key begins with the same words
        if own is None or own.certificate is None or any(line.startswith(key) for line in problems):
            continue
        verdict = certificates.judge(own.certificate, serves=section == "ssl")
        line = f"{place}{section}.certificate: {own.certificate} {verdict.text}"
        if verdict.is_fatal:
            found.problems.append(line)
        elif verdict.text:
            found.warnings.append(line)
    upstream = what.upstream_tls
    if upstream is not None and upstream.tls_verify and upstream.ca_file is None and not places.authorities.is_file():
        found.problems.append(f"{place}upstream_tls.ca_file: is missing, and this host has none: {places.authorities}")


def _secret(path: Path) -> Iterator[str]:
    try:
        if os.geteuid() != 0 and path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
            yield f"{path} can be read or changed by others: chmod o-rwx {path}"
        content = read_bytes(path, MAX_SECRET)
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror}"
        return
    except UnusableFileError as error:
        yield f"{path} {error}"
        return
    if not content:
        yield f"{path} is empty"
    elif content.endswith((b"\n", b"\r")):
        yield f"{path} ends with a newline, which would be a part of the secret: write it with printf %s"
    elif content != content.strip() or any(not 0x20 <= byte < 0x7F for byte in content):
        yield f"{path} has blanks around it, or characters that no header can have"

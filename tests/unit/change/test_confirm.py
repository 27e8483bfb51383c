"""What systemd is asked for; tests/netns/test_confirm.py has real guardians."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tpctl.change import background, confirm
from tpctl.change.before import Before
from tpctl.record import state
from tpctl.system import detached
from tpctl.system.errors import ApplyError
from tpctl.system.runner import Finished

PENDING = confirm.Pending("install", 60.0, 0.0, "0123abcd", confirm.TIMER, Before())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "DIRECTORY", tmp_path)
    monkeypatch.setattr(background, "systemd_runs_here", lambda: True)
    monkeypatch.setattr(confirm.before, "take", lambda record: Before())  # type: ignore[attr-defined]
    return tmp_path


class Programs:
    """Stands where programs are run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, exit_code: int = 0) -> None:
        self.run: list[list[str]] = []
        self.started: list[list[str]] = []

        def run(argv: list[str]) -> Finished:
            self.run.append(argv)
            return Finished(tuple(argv), exit_code, "", "")

        monkeypatch.setattr("tpctl.system.runner.run", run)
        monkeypatch.setattr(detached, "start", lambda argv, environment: self.started.append(argv))


def test_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = confirm.timer_argv(PENDING)
    assert argv[0] == "systemd-run"
    assert {"--unit=tpctl-rollback-0123abcd", "--on-active=60000ms", "--collect"} <= set(argv)
    assert argv[-6:] == [sys.executable, "-m", "tpctl.cli.main", "rollback", "--token", "0123abcd"]
    home = Path(confirm.__file__).resolve().parents[2]
    assert any(word.startswith(f"--setenv=PYTHONPATH={home}") for word in argv)


def test_where_systemd_runs_it_keeps_the_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch)
    with confirm.guarded("install", 60.0, None) as pending:
        assert pending
        assert programs.run == [confirm.timer_argv(pending)]
    assert programs.started == []
    assert pending.guardian == confirm.TIMER
    assert confirm.load() == pending
    confirm.drop(pending)
    assert programs.run[-1] == ["systemctl", "stop", f"tpctl-rollback-{pending.token}.timer"]
    assert confirm.load() is None


def test_where_systemd_cannot_a_process_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch, exit_code=1)
    with confirm.guarded("install", 60.0, None) as pending:
        assert pending
    assert pending.guardian == confirm.PROCESS
    assert programs.started == [[*confirm.guardian_argv(pending.token), "--wait", "60.0"]]


def test_a_change_that_failed_needs_no_guardian(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch)
    with pytest.raises(ApplyError), confirm.guarded("install", 60.0, None):
        raise ApplyError("refused")
    assert confirm.load() is None
    assert programs.run[-1][:2] == ["systemctl", "stop"]


def test_a_way_back_that_cannot_be_written_stops_the_change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch)
    confirm.path().mkdir(parents=True)
    with (
        pytest.raises(ApplyError, match=r"pending\.json cannot be written: Is a directory\. Nothing was changed$"),
        confirm.guarded("install", 60.0, None),
    ):
        pytest.fail("the change was made without a way back")
    assert programs.run[-1][:2] == ["systemctl", "stop"], "nothing is left that waits"


def test_a_record_that_cannot_be_removed_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Programs(monkeypatch)
    confirm.path().mkdir(parents=True)
    with pytest.raises(ApplyError, match=r"pending\.json, cannot be removed: Is a directory; see `tpctl status`"):
        confirm.drop(None)


def test_what_stopped_a_change_is_said_with_what_stopped_its_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Programs(monkeypatch)

    def change() -> None:
        with confirm.guarded("install", 60.0, None):
            confirm.path().unlink()
            confirm.path().mkdir()
            raise ApplyError("refused")

    with pytest.raises(ApplyError, match=r"refused\. The record .* cannot be removed"):
        change()


def test_a_change_that_broke_off_keeps_its_guardian(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Programs(monkeypatch)
    with pytest.raises(ZeroDivisionError), confirm.guarded("install", 60.0, None):
        raise ZeroDivisionError
    assert confirm.load()


def children() -> set[int]:
    """The children of this process, ended ones included that nobody has waited for; other tests may have left some."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(ApplyError, match="No such file or directory"):
        detached.start([str(tmp_path / "none")], {})
    assert children() <= before

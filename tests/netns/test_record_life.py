"""A record lives as long as its network namespace: the next one inherits nothing, and what is left is tidied away."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpctl.record import life, state
from tpctl.record.state import State
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.policy import Policy

pytestmark = pytest.mark.root

NO_SUCH_OPTION = 0x7FFE
PATIENCE_SECONDS = 60.0
REBIRTH_SECONDS, REBIRTHS = 5.0, 40


@pytest.fixture(autouse=True)
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where records are in these tests."""
    monkeypatch.setattr(state, "DIRECTORY", tmp_path / "records")
    return tmp_path / "records"


def recorded(space: Namespace) -> str:
    """Put a policy on record in a namespace; its key."""
    with space.inside(), state.locked():
        state.save(State(Policy(proxy_uid=5678)))
        return state.namespace_key()


def tidy() -> None:
    """What any command does that takes the lock, in a namespace of its own."""
    space = Namespace()
    with space.inside(), state.locked():
        pass
    space.close()


def is_tidied(records: Path, key: str) -> bool:
    tidy()
    return not (records / key).exists() and not (records / f"{key}.lock").exists()


def awaited(records: Path, *keys: str) -> bool:
    """Whether one of these records goes: the kernel takes namespaces down in the background."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(is_tidied(records, key) for key in keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def without_cookies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux before 5.14: a namespace has an inode number that the next one may get."""
    monkeypatch.setattr(life, "SO_NETNS_COOKIE", NO_SUCH_OPTION)


def of_inode(number: int) -> Namespace | None:
    """A new namespace with the inode number of one that has gone; None when somebody else seems to have got it."""
    others: list[Namespace] = []
    deadline = time.monotonic() + REBIRTH_SECONDS
    try:
        while time.monotonic() < deadline:
            made = Namespace()
            if os.fstat(made.fd).st_ino == number:
                return made
            others.append(made)
            if len(others) > 50:
                others.pop(0).close()
                time.sleep(0.02)
    finally:
        for other in others:
            other.close()
    return None


def reborn(records: Path) -> tuple[str, Namespace]:
    """The key of a record whose namespace has gone, and a new namespace with the inode number of that one.

    Whoever makes a namespace, also of mounts or processes, gets the lowest number that is free.
    """
    for _ in range(REBIRTHS):
        first = Namespace()
        number = os.fstat(first.fd).st_ino
        key = recorded(first)
        assert key == f"netns-inode-{number}"
        with first.inside():
            assert state.load() is not None
        first.close()
        if second := of_inode(number):
            return key, second
        shutil.rmtree(records / key)
    raise AssertionError("no new namespace gets the inode number of one that has gone")


@pytest.mark.usefixtures("without_cookies")
def test_a_namespace_of_the_same_inode_number_inherits_nothing(records: Path) -> None:
    key, second = reborn(records)
    with second.inside():
        assert state.namespace_key() == key
        assert state.load() is None
        with state.locked():
            assert not (records / key / "state.json").exists()
    assert recorded(second) == key
    with second.inside():
        assert state.load() is not None
    second.close()


@pytest.mark.parametrize("cookies", [True, False])
def test_what_is_left_of_a_dead_namespace_goes(records: Path, monkeypatch: pytest.MonkeyPatch, cookies: bool) -> None:
    if not cookies:
        monkeypatch.setattr(life, "SO_NETNS_COOKIE", NO_SUCH_OPTION)
    # Without cookies, what another test makes meanwhile may have the inode number of one that has gone.
    count = 1 if cookies else 5
    dead, alive = ([Namespace() for _ in range(count)] for _ in range(2))
    gone, kept = ([recorded(space) for space in spaces] for spaces in (dead, alive))
    tidy()
    assert all((records / key / "state.json").exists() for key in (*gone, *kept))
    for space in dead:
        space.close()
    assert awaited(records, *gone)
    assert all((records / key / "state.json").exists() for key in kept)
    assert all((records / f"{key}.lock").exists() for key in kept)
    for space in alive:
        space.close()
    assert awaited(records, *kept)


def test_a_namespace_that_only_a_socket_holds_lives(records: Path) -> None:
    """No process is in it, and no mount or descriptor of it is there to be found."""
    space = Namespace()
    key = recorded(space)
    with space.inside():
        held = socket.socket()
    space.close()
    for _ in range(3):
        assert not is_tidied(records, key)
        time.sleep(0.2)
    held.close()
    assert awaited(records, key)


def test_a_namespace_that_only_a_mount_holds_lives(records: Path) -> None:
    name = f"tpctl-life-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        space = Namespace.current()
        space.close()
        space.fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        key = recorded(space)
        space.close()
        assert not is_tidied(records, key)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
    assert awaited(records, key)


@pytest.fixture
def space() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


def rewritten(records: Path, key: str, **namespace: object) -> None:
    file = records / key / "state.json"
    document = json.loads(file.read_text())
    if namespace:
        document["namespace"].update(namespace)
    else:
        del document["namespace"]
    file.write_text(json.dumps(document))


def test_a_record_of_an_earlier_boot(records: Path, space: Namespace) -> None:
    """/run of a container is no tmpfs, and cookies are given anew after a boot."""
    key = recorded(space)
    rewritten(records, key, boot="another")
    with space.inside():
        assert state.load() is None
    assert is_tidied(records, key)


def test_a_record_of_an_older_version_counts_and_stays(records: Path, space: Namespace) -> None:
    key = recorded(space)
    rewritten(records, key)
    with space.inside():
        assert state.load() is not None
    assert not is_tidied(records, key)


def test_nothing_is_taken_for_dead_that_cannot_be_asked_about(records: Path, space: Namespace) -> None:
    key = recorded(space)
    for namespace in ({"home": "netns-1"}, {"id": None}, {"id": "x"}, {"id": -1}, {"id": 2**40}):
        rewritten(records, key, **namespace)
        assert not is_tidied(records, key)


def test_a_lock_that_is_held_stays(records: Path, space: Namespace) -> None:
    key = recorded(space)
    rewritten(records, key, boot="another")
    other = Namespace()
    with space.inside(), state.locked(), other.inside():
        state.save(State(Policy(proxy_uid=1)))
        with space.inside():
            state.save(State(Policy(proxy_uid=1)))
        rewritten(records, key, boot="another")
        with state.locked():
            pass
        assert (records / key / "state.json").exists()
    other.close()
    assert is_tidied(records, key)


RIVAL = """
import sys
from pathlib import Path
from tpctl.record import state
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.policy import Policy
state.DIRECTORY = Path(sys.argv[1])
for _ in range(20):
    space = Namespace()
    with space.inside():
        with state.locked():
            state.save(state.State(Policy(proxy_uid=5678)))
        assert state.load() is not None
        with state.locked():
            state.clear()
    space.close()
    space = Namespace()  # one that leaves its record behind
    with space.inside(), state.locked():
        state.save(state.State(Policy(proxy_uid=5678)))
    space.close()
"""


def test_several_commands_at_once(records: Path) -> None:
    rivals = [subprocess.Popen([sys.executable, "-c", RIVAL, str(records)]) for _ in range(4)]
    assert [rival.wait(PATIENCE_SECONDS * 5) for rival in rivals] == [0] * 4
    deadline = time.monotonic() + PATIENCE_SECONDS
    while records.exists() and list(records.iterdir()) and time.monotonic() < deadline:
        tidy()
        time.sleep(0.05)
    assert not records.exists() or list(records.iterdir()) == []

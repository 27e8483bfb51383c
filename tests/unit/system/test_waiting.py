"""Whatever is waited for is waited for no longer than a limit."""

from __future__ import annotations

import _thread
import ctypes
import errno
import os
import pwd
import resource
import select
import socket
import threading
import time

import pytest

from tpctl.host import users
from tpctl.system import child, netlink, runner, threads
from tpctl.system.errors import ApplyError, HostError

SHORT = 0.05


def test_a_kernel_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "WAIT_SECONDS", SHORT)
    with netlink.Netlink(netlink.ROUTE) as kernel:
        monkeypatch.setattr(socket.socket, "send", lambda *_: 0)  # what is not sent is not answered
        with pytest.raises(OSError, match=r"within 0\.05 s") as raised:
            kernel.change(22, bytes(8))
    assert raised.value.errno == errno.ETIMEDOUT


def test_a_kernel_that_refuses() -> None:
    with netlink.Netlink(netlink.ROUTE) as kernel, pytest.raises(OSError, match=r"Operation not supported|permitted"):
        kernel.change(0x7FF0, bytes(16))


def test_attributes_come_back() -> None:
    packed = netlink.attributes({1: b"abc", 2: 7, 3: {4: b"\x01", 5: {6: b"deep"}}})
    found = netlink.parse(packed)
    assert (found[1], found[2]) == (b"abc", (7).to_bytes(4, "little" if found[2][0] else "big"))
    assert netlink.parse(netlink.parse(found[3])[5]) == {6: b"deep"}


@pytest.mark.parametrize("cut", range(1, 24))
def test_attributes_that_are_cut_short(cut: int) -> None:
    packed = netlink.attributes({1: b"abc", 2: 7, 3: {4: b"\x01"}})
    assert set(netlink.parse(packed[:cut])) <= {1, 2, 3}


def test_a_thread_that_never_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_thread, "start_new_thread", lambda *_: 0)
    with pytest.raises(ApplyError, match=r"within 0\.05 s"):
        threads.in_thread(lambda: None, seconds=SHORT)


def test_a_thread_that_never_ends() -> None:
    wait = threading.Event()
    with pytest.raises(ApplyError, match=r"within 0\.05 s"):
        threads.in_thread(wait.wait, seconds=SHORT)
    wait.set()


def test_no_room_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    with pytest.raises(MemoryError):
        threads.in_thread(lambda: None)


def test_a_thread_hands_back_and_raises() -> None:
    assert threads.in_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        threads.in_thread(lambda: 1 // 0)


def test_a_child_ends_in_time_with_a_thousand_files_open() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1200:
        pytest.skip("no process may open so many files here")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1200, before[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert child.in_child(lambda: "done") == "done"
        began = time.monotonic()
        with pytest.raises(ApplyError, match=r"within 0\.05 s"):
            child.in_child(lambda: str(threading.Event().wait()), seconds=SHORT)
        assert time.monotonic() - began < 60
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_program_that_never_ends_goes_with_what_it_has_started() -> None:
    """What it has started would hold the lock on."""
    reading, writing = os.pipe()
    runner.INHERITED.add(writing)
    try:
        with pytest.raises(ApplyError, match=r"did not end within 0\.5 s and was killed"):
            runner.run(["sh", "-c", "sleep 1000 & sleep 1000"], timeout=0.5)
    finally:
        runner.INHERITED.discard(writing)
        os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        ready, _, _ = select.select([stream], [], [], 60)
        assert ready, "somebody still holds what it was given"


def test_a_user_database_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)
    monkeypatch.setattr(users, "SECONDS", SHORT)
    # In C, like a module of nsswitch.conf(5): no signal handler of Python's would run before it returns.
    monkeypatch.setattr(pwd, "getpwnam", lambda _: libc.sleep(1000))
    with pytest.raises(HostError, match=r"has not told about the user envoy within 0\.05 s, and nothing was changed"):
        users.uid_of("envoy")
    monkeypatch.setattr(users, "SECONDS", 60)
    assert users.name_of(0) == "root"

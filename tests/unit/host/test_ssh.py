"""How the caller's ssh session is found, on a /proc made of files; tests/netns has a real sshd's process tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpctl.host import ssh

SESSION = "10.0.0.9 50000 10.0.0.5 2222"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setattr(ssh, "sockets_of_tables", lambda: {"77": 2222, "78": 80})
    monkeypatch.setattr(os, "getppid", lambda: 30)
    return tmp_path


def process(proc: Path, pid: int, parent: int, comm: str = "bash", environ: str = "", socket: str = "") -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} ({comm} (x) y) S {parent} 1 1 0")
    (folder / "comm").write_text(comm + "\n")
    (folder / "environ").write_text(environ)
    if socket:
        (folder / "fd" / "3").symlink_to(f"socket:[{socket}]")


def test_sudo_drops_the_variable_but_the_login_shell_has_it(proc: Path) -> None:
    process(proc, 30, 20, "sudo")
    process(proc, 20, 10, environ=f"HOME=/root\0SSH_CONNECTION={SESSION}\0")
    assert ssh.session_port(proc) == 2222


@pytest.mark.parametrize("server", sorted(ssh.SERVERS))
def test_the_socket_of_the_server_tells_when_no_environment_does(proc: Path, server: str) -> None:
    process(proc, 30, 20, "sudo")
    process(proc, 20, 10)
    process(proc, 10, 1, server, socket="77")
    assert ssh.session_port(proc) == 2222


def test_sockets_of_other_programs_say_nothing(proc: Path) -> None:
    process(proc, 30, 20, "nginx", socket="78")
    process(proc, 20, 1)
    assert ssh.session_port(proc) is None


def test_a_session_into_another_network_namespace_is_none(proc: Path) -> None:
    process(proc, 30, 1, "sshd", environ="SSH_CONNECTION=10.0.0.9 50000 10.0.0.5 22\0", socket="99")
    assert ssh.session_port(proc) is None


def test_a_process_that_ends_meanwhile_is_skipped(proc: Path) -> None:
    process(proc, 30, 20)
    (proc / "30" / "environ").unlink()
    process(proc, 20, 20, environ=f"SSH_CONNECTION={SESSION}\0")
    assert ssh.session_port(proc) == 2222
    (proc / "20" / "environ").unlink()
    assert ssh.session_port(proc) is None


@pytest.mark.parametrize("value", ["UNKNOWN 65535 UNKNOWN 65535", "", "1 2", "10.0.0.9 5 10.0.0.5 x"])
def test_what_is_no_tcp_session(value: str) -> None:
    assert ssh.port_of(value) is None

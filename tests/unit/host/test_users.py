"""Users and privilege."""

from __future__ import annotations

import os
import pwd

import pytest

from tpctl.host import facts, ssh, users
from tpctl.host.privilege import require_root
from tpctl.system.errors import HostError

NOBODY = pwd.getpwnam("nobody").pw_uid


@pytest.mark.parametrize(
    ("given", "uid"),
    [
        ("root", 0),
        ("0", 0),
        ("nobody", NOBODY),
        (str(NOBODY), NOBODY),
        ("no-such-user", None),
        ("4294967294", None),
        ("99999999999999999999", None),
        ("", None),
        ("a\0b", None),
        ("٨", None),
    ],
)
def test_uid_of(given: str, uid: int | None) -> None:
    assert users.uid_of(given) == uid


def test_name_of() -> None:
    assert users.name_of(0) == "root"
    assert users.name_of(4294967294) is None
    assert users.name_of(2**40) is None


def test_require_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    require_root("tpctl install")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match=r"^tpctl install .* needs root: run it with sudo, or add --dry-run to look$"):
        require_root("tpctl install")
    for command in ("tpctl status", "tpctl uninstall"):  # whose --dry-run needs root, too, if there is one
        with pytest.raises(HostError, match=rf"^{command} .* needs root: run it with sudo$"):
            require_root(command)


@pytest.mark.parametrize(
    ("value", "port"), [("10.0.0.9 50000 10.0.0.5 2222", 2222), ("", None), ("x y z w", None), ("1 2 3", None)]
)
def test_ssh_session(monkeypatch: pytest.MonkeyPatch, value: str, port: int | None) -> None:
    monkeypatch.setenv("SSH_CONNECTION", value)
    monkeypatch.setattr(ssh, "sockets_of_tables", lambda: {"1": 2222})
    assert facts.LiveHost().ssh_session_port() == port

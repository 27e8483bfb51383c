"""Files that the relay trusts, of which others could read the key, or put in their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tpctl.config.yaml_text import parse_yaml
from tpctl.relay.settings.file import settings_of
from tpctl.relay.settings.model import Settings
from tpctl.relay.settings.trusted_files import require_own
from tpctl.system.errors import InputError

DAEMON, NOBODY = 1, 65534
"""Users that every Debian has. The relay is the first of them."""
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files change their owner")
FILES = {
    "certificate": "listener tls: ssl.certificate",
    "key": "listener tls: ssl.certificate_key",
    "clients": "listener tls: ssl.client_ca_file",
    "own": "listener tls: upstream_tls.certificate",
    "own-key": "listener tls: upstream_tls.certificate_key",
    "servers": "listener tls: upstream_tls.ca_file",
    "zone": "DNS zone file",
}
KEYS = ("key", "own-key")
CONFIGURATION = """
user: daemon
dns: {{zone_file: {0}/zone}}
listeners:
  - name: tls
    listen: "127.0.0.1:8443 ssl"
    direction: inbound
    upstream: 127.0.0.1:8080
    ssl: {{certificate: {0}/certificate, certificate_key: {0}/key, client_ca_file: {0}/clients}}
    upstream_tls: {{certificate: {0}/own, certificate_key: {0}/own-key, ca_file: {0}/servers}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of root's with files as they should be."""
    for name in FILES:
        (tmp_path / name).write_text("10.0.0.1 a.mesh\n")
        (tmp_path / name).chmod(0o640 if name in KEYS else 0o644)
    return tmp_path


def settings(folder: Path) -> Settings:
    return settings_of(parse_yaml(CONFIGURATION.format(folder)), "relay.yaml")


def refusals(folder: Path) -> list[str]:
    with pytest.raises(InputError) as refused:
        require_own(settings(folder))
    return list(refused.value.problems)


def test_files_of_roots_are_taken(folder: Path) -> None:
    require_own(settings(folder))


@pytest.mark.parametrize("owner", [(0, DAEMON), (DAEMON, DAEMON), (0, NOBODY)])
def test_a_key_may_be_readable_for_a_group_and_belong_to_the_relays_user(folder: Path, owner: tuple[int, int]) -> None:
    for name in KEYS:
        os.chown(folder / name, *owner)
    require_own(settings(folder))


def test_all_files_may_belong_to_the_relays_user(folder: Path) -> None:
    for path in (folder, *folder.iterdir()):
        os.chown(path, DAEMON, DAEMON)
    require_own(settings(folder))
    (problem, *_) = refusals_of_root(folder)
    assert f"lies below {folder}, which belongs to uid {DAEMON}" in problem


def refusals_of_root(folder: Path) -> list[str]:
    with pytest.raises(InputError) as refused:
        require_own(replace(settings(folder), user=None))
    return list(refused.value.problems)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o642])
@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_others_may_read_or_write_is_refused(folder: Path, name: str, mode: int) -> None:
    (folder / name).chmod(mode)
    (problem,) = refusals(folder)
    assert problem.startswith(f"{FILES[name]}: {folder / name} belongs to uid 0 and has mode {mode:04o}, and it is")
    command = problem.rpartition(": ")[2]
    assert command == f"chown root:daemon {folder / name} && chmod 0640 {folder / name}"
    subprocess.run(["/bin/sh", "-c", command], check=True)
    require_own(settings(folder))


@pytest.mark.parametrize("mode", [0o646, 0o664])
@pytest.mark.parametrize("name", [name for name in FILES if name not in KEYS])
def test_what_is_trusted_and_others_may_write_is_refused(folder: Path, name: str, mode: int) -> None:
    (folder / name).chmod(mode)
    (problem,) = refusals(folder)
    assert problem == (
        f"{FILES[name]}: {folder / name} belongs to uid 0 and has mode {mode:04o}, and it is trusted, so nobody else "
        f"may change it: chmod go-w {folder / name}"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_somebody_else_is_refused(folder: Path, name: str) -> None:
    os.chown(folder / name, NOBODY, NOBODY)
    (problem,) = refusals(folder)
    assert problem.startswith(f"{FILES[name]}: {folder / name} belongs to uid {NOBODY}")
    assert f"chown root:{'daemon' if name in KEYS else 'root'} {folder / name}" in problem


@pytest.mark.parametrize(("owner", "mode"), [(NOBODY, 0o755), (0, 0o777), (0, 0o775)])
def test_a_folder_in_which_others_can_replace_them_is_refused(folder: Path, owner: int, mode: int) -> None:
    os.chown(folder, owner, owner)
    folder.chmod(mode)
    problems = refusals(folder)
    assert len(problems) == len(FILES)
    assert all(f"lies below {folder}, which belongs to uid {owner} and has mode {mode:04o}" in one for one in problems)


def test_symbolic_links_as_debian_has_them(folder: Path) -> None:
    """/etc/letsencrypt/live is full of them, and /etc/ssl/certs."""
    (folder / "live").mkdir()
    for name in FILES:
        (folder / "live" / name).symlink_to(f"../{name}")
    require_own(settings(folder / "live"))
    os.chown(folder / "live/key", NOBODY, NOBODY, follow_symlinks=False)
    (problem,) = refusals(folder / "live")
    assert f"is reached by the symbolic link {folder}/live/key, which belongs to uid {NOBODY}" in problem


def test_what_is_missing_is_for_others_to_say(folder: Path) -> None:
    (folder / "key").unlink()
    require_own(settings(folder))


def test_whoever_is_not_root_is_not_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload is made by the relay's user, for whom others may have changed nothing since the start."""
    (folder / "key").chmod(0o644)
    monkeypatch.setattr("os.geteuid", lambda: DAEMON)
    require_own(settings(folder))


def test_the_command_says_so(folder: Path) -> None:
    (folder / "key").chmod(0o644)
    (folder / "zone").chmod(0o666)
    (folder / "relay.yaml").write_text(CONFIGURATION.format(folder))
    for more in (["--check-config"], []):
        argv = [sys.executable, "-m", "tpctl.cli.main", "relay", "--config", str(folder / "relay.yaml"), *more]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=180)
        assert done.returncode == 2
        assert [line.partition(" belongs")[0] for line in done.stderr.splitlines()] == [
            f"error: DNS zone file: {folder}/zone",
            f"error: listener tls: ssl.certificate_key: {folder}/key",
        ]

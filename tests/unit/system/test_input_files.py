"""Files that root reads: whose they are, what they are, and which programs they name."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.system import files_of_root
from tests.unit.system.files_of_root import NOBODY, POLICY, needs_root, refusal
from tpctl.config import load as config
from tpctl.host.resolvers import load as read_resolv_conf
from tpctl.relay.connections.tls import load as load_tls
from tpctl.relay.dns.zone_file import read_zone_file
from tpctl.relay.settings.dns import DnsSettings
from tpctl.relay.settings.file import load as load_relay
from tpctl.relay.settings.listen import Listen, read_address
from tpctl.relay.settings.model import ListenerSettings, Role, ServerTls, Settings
from tpctl.relay.settings.trusted_files import require_file
from tpctl.system.errors import HostError, InputError
from tpctl.system.input_files import read_configuration

file = files_of_root.file


@needs_root
def test_a_file_of_roots_own_is_read(file: Path) -> None:
    assert read_configuration(str(file)) == POLICY


@needs_root
@pytest.mark.parametrize("mode", [0o646, 0o664, 0o666, 0o777])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    said = refusal(file)
    assert f"mode {mode:04o}" in said
    assert f"chmod go-w {file}" in said
    assert "chown" not in said


@needs_root
def test_a_file_of_another_user_is_refused_even_if_only_he_may_write(file: Path) -> None:
    os.chown(file, NOBODY, NOBODY)
    file.chmod(0o600)
    said = refusal(file)
    assert f"belongs to uid {NOBODY} and has mode 0600" in said
    assert f"chown root:root {file}" in said


@needs_root
def test_the_commands_it_names_are_right_for_the_shell(tmp_path: Path) -> None:
    file = tmp_path / "a b;$(touch owned).yaml"
    file.write_text(POLICY)
    os.chown(file, NOBODY, NOBODY)
    file.chmod(0o666)
    command = refusal(file).partition("may change: ")[2].partition(" (or")[0]
    subprocess.run(["/bin/sh", "-c", command], check=True, cwd=tmp_path)
    assert read_configuration(str(file)) == POLICY
    assert not (tmp_path / "owned").exists()


@needs_root
@pytest.mark.parametrize(("owner", "mode"), [(NOBODY, 0o755), (0, 0o777), (0, 0o775), (NOBODY, 0o1777)])
def test_a_directory_in_which_others_can_replace_the_file_is_refused(file: Path, owner: int, mode: int) -> None:
    os.chown(file.parent, owner, owner)
    file.parent.chmod(mode)
    said = refusal(file)
    assert f"lies below {file.parent}, which belongs to uid {owner} and has mode {mode:04o}" in said


@needs_root
def test_every_directory_above_counts(tmp_path: Path) -> None:
    inner = tmp_path / "open" / "closed"
    inner.mkdir(parents=True)
    (inner / "f.yaml").write_text(POLICY)
    inner.parent.chmod(0o777)
    assert f"lies below {inner.parent}," in refusal(inner / "f.yaml")


@needs_root
def test_a_sticky_directory_of_roots_is_good_enough_for_a_file_of_roots(file: Path) -> None:
    file.parent.chmod(0o1777)
    assert read_configuration(str(file)) == POLICY
    os.chown(file, NOBODY, NOBODY)
    assert "belongs to uid" in refusal(file)


@needs_root
def test_relative_names_and_dots(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    (file.parent / "below").mkdir()
    assert read_configuration(file.name) == POLICY
    assert read_configuration(f"./below/..//{file.name}") == POLICY
    (file.parent / "below").chmod(0o777)
    assert f"lies below {file.parent}/below," in refusal(f"below/../{file.name}")
    file.parent.chmod(0o777)
    assert f"lies below {file.parent}," in refusal(file.name)


@needs_root
def test_symbolic_links_of_roots_are_followed_and_those_of_others_are_not(file: Path) -> None:
    (file.parent / "folder").mkdir()
    (file.parent / "folder/link.yaml").symlink_to("../tpctl.yaml")
    (file.parent / "away").symlink_to(file.parent / "folder")
    link = file.parent / "away" / "link.yaml"
    assert read_configuration(str(link)) == POLICY
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    said = refusal(link)
    assert f"the symbolic link {file.parent}/folder/link.yaml, which belongs to uid {NOBODY}" in said
    os.chown(link, 0, 0, follow_symlinks=False)
    os.chown(file, NOBODY, NOBODY)
    assert f"chown root:root {file} " in refusal(link)


@needs_root
def test_links_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "a")


@needs_root
def test_a_file_that_is_exchanged_between_two_looks_is_judged_as_it_was_opened(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = file.with_name("planted")
    planted.write_text("redirect: {inbound: {port: 1}}\n")
    os.chown(planted, NOBODY, NOBODY)
    opening = os.open

    def exchanged(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == file.name and not flags & os.O_PATH:
            planted.replace(file)
        return opening(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", exchanged)
    assert "belongs to uid" in refusal(file)


@needs_root
def test_what_is_no_file_is_refused_without_waiting(file: Path) -> None:
    assert "Is a directory" in refusal(file.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(file.with_name("socket")))
        assert "it is a socket, not a file" in refusal(file.with_name("socket"))
    os.mkfifo(file.with_name("fifo"), 0o600)
    assert "it is a FIFO, not a file" in refusal(file.with_name("fifo"))
    file.with_name("link").symlink_to(file.with_name("fifo"))
    assert "it is a FIFO, not a file" in refusal(file.with_name("link"))


@needs_root
def test_devices(tmp_path: Path) -> None:
    block = tmp_path / "block"
    os.mknod(block, 0o060600, os.makedev(7, 200))
    for device in ("/dev/null", "/dev/zero", "/dev/tty", block):
        assert "it is a device, not a file" in refusal(device)


READERS: dict[str, Callable[[Path], object]] = {
    "configuration": lambda path: config.load(files=[str(path)]),
    "dataplane": lambda path: config.load(flags={"dataplane_file": [str(path)]}),
    "relay": lambda path: load_relay(str(path)),
    "zone": lambda path: read_zone_file(path, "mesh"),
    "resolv.conf": lambda path: read_resolv_conf(str(path)),
    "certificate": lambda path: load_tls(_with_tls(path)),
    "resolv.conf of the relay": lambda path: require_file(Settings(dns=DnsSettings(path))),
}


def _with_tls(path: Path) -> Settings:
    server = ServerTls(path, path, client_ca_file=path)
    return Settings((ListenerSettings("in", Role.INBOUND, Listen(read_address("127.0.0.1:1")), ssl=server),))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "directory"])
def test_whatever_is_read_must_be_a_file(reader: str, kind: str, tmp_path: Path) -> None:
    """Nobody writes to the FIFO: to open it would never return."""
    place = Path("/dev/zero") if kind == "device" else tmp_path / "place"
    if kind == "FIFO":
        os.mkfifo(place, 0o600)
    elif kind == "directory":
        place.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
    with pytest.raises((InputError, HostError)) as refused:
        READERS[reader](place)
    assert str(place) in str(refused.value)
    assert ("Is a directory" if kind == "directory" else f"it is a {kind}, not a file") in str(refused.value)


def test_standard_input_and_process_substitution_stay_usable(tmp_path: Path) -> None:
    code = "import sys; from tpctl.config.load import load; print(load(files=sys.argv[1:]).inbound_port)"
    python = shlex.quote(sys.executable)
    script = f"""
        {python} -c '{code}' <(sleep 0.1; echo 'redirect: {{inbound: {{port: 7001}}}}')
        echo 'redirect: {{inbound: {{port: 7002}}}}' | {python} -c '{code}' -
        {python} -c '{code}' /dev/stdin <<< 'redirect: {{inbound: {{port: 7003}}}}'
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["7001", "7002", "7003"], done.stderr


def test_a_descriptor_that_is_not_open(file: Path) -> None:
    assert "Bad file descriptor" in refusal("/dev/fd/987654")


@needs_root
def test_an_ordinary_user_may_read_what_he_likes(file: Path) -> None:
    file.chmod(0o666)
    for folder in (file.parent, *file.parents):
        if folder.name.startswith(("pytest-", "popen-")) or folder == file.parent:
            folder.chmod(0o755)
    code = (
        "import os, tpctl.system.input_files as i; os.setgid(65534); os.setuid(65534);"
        f"print(i.read_configuration({str(file)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == POLICY.strip(), done.stderr


@needs_root
@pytest.mark.parametrize("what", ["file", "dataplane", "relay"])
def test_every_configuration_is_read_that_way(file: Path, what: str) -> None:
    os.chown(file, NOBODY, NOBODY)
    readers: dict[str, Callable[[], object]] = {
        "file": lambda: config.load(files=[str(file)]),
        "dataplane": lambda: config.load(flags={"dataplane_file": [str(file)]}),
        "relay": lambda: load_relay(str(file)),
    }
    with pytest.raises(InputError) as refused:
        readers[what]()
    (problem,) = refused.value.problems
    assert problem.startswith(f"{'dataplane' if what == 'dataplane' else 'file'} {file}: belongs to uid {NOBODY}")


@needs_root
def test_the_command_refuses_it_with_one_message(file: Path) -> None:
    file.chmod(0o666)
    argv = [sys.executable, "-m", "tpctl.cli.main", "install", "--dry-run", "--config", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: file {file}: belongs to uid 0 and has mode 0666")
    assert done.stderr.count("\n") == 1


# -- what a file may hold ----------------------------------------------------------------------------------------------

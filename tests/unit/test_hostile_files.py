"""Configuration files that somebody else wrote, may change, or made to exhaust whoever reads them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import config
from agent.config_values import MAX_SHOWN, BadValueError, quoted, read_executables, read_path, read_text, shown
from agent.errors import HostError, InputError
from agent.host.resolvers import read_resolv_conf
from agent.input_files import MAX_CONFIGURATION, UnusableFileError, read_configuration
from agent.relay.config_file import load as load_relay
from agent.relay.dns_zone_file import read_zone_file
from agent.relay.resolvers import ResolvConf
from agent.yaml_text import MAX_DEPTH, parse_yaml

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files change their owner")
POLICY = "redirect: {inbound: {port: 15006}}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "tpctl.yaml"
    made.write_text(POLICY)
    made.chmod(0o644)
    return made


def refusal(path: Path | str) -> str:
    with pytest.raises(UnusableFileError) as refused:
        read_configuration(str(path))
    said = str(refused.value)
    assert "\n" not in said
    return said


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
    import socket

    assert "Is a directory" in refusal(file.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(file.with_name("socket")))
        assert "it is not a file" in refusal(file.with_name("socket"))
    os.mkfifo(file.with_name("fifo"), 0o622)
    file.with_name("fifo").chmod(0o622)
    assert "may change" in refusal(file.with_name("fifo"))


@needs_root
def test_devices(tmp_path: Path) -> None:
    assert read_configuration("/dev/null") == ""
    assert f"larger than {MAX_CONFIGURATION} bytes" in refusal("/dev/zero")
    block = tmp_path / "block"
    os.mknod(block, 0o060600, os.makedev(7, 200))
    assert "it is not a file" in refusal(block)


def test_standard_input_and_process_substitution_stay_usable(tmp_path: Path) -> None:
    code = "import sys; from agent.config import load; print(load(files=sys.argv[1:]).inbound_port)"
    script = f"""
        {sys.executable} -c '{code}' <(sleep 0.1; echo 'redirect: {{inbound: {{port: 7001}}}}')
        echo 'redirect: {{inbound: {{port: 7002}}}}' | {sys.executable} -c '{code}' -
        {sys.executable} -c '{code}' /dev/stdin <<< 'redirect: {{inbound: {{port: 7003}}}}'
        mkfifo -m 600 {tmp_path}/fifo
        {sys.executable} -c '{code}' {tmp_path}/fifo & sleep 0.3
        echo 'redirect: {{inbound: {{port: 7004}}}}' > {tmp_path}/fifo; wait $!
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["7001", "7002", "7003", "7004"], done.stderr


def test_a_descriptor_that_is_not_open(file: Path) -> None:
    assert "Bad file descriptor" in refusal("/dev/fd/987654")


@needs_root
def test_an_ordinary_user_may_read_what_he_likes(file: Path) -> None:
    file.chmod(0o666)
    for folder in (file.parent, *file.parents):
        if folder.name.startswith("pytest-") or folder == file.parent:
            folder.chmod(0o755)
    code = (
        "import os, agent.input_files as i; os.setgid(65534); os.setuid(65534);"
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
    argv = [sys.executable, "-m", "agent.cli.main", "install", "--dry-run", "--config", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: file {file}: belongs to uid 0 and has mode 0666")
    assert done.stderr.count("\n") == 1


# -- what a file may hold ----------------------------------------------------------------------------------------------


def bomb(depth: int, width: int) -> str:
    """A few lines of aliases that stand for `width` to the power of `depth` values."""
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines)


def merges(depth: int) -> str:
    lines = ["a0: &a0 {k0: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}" for n in range(1, depth)]
    return "\n".join(lines)


HOSTILE = {
    "aliases": (bomb(12, 9), "too many values"),
    "merge keys": (merges(12), "too many values"),
    "a chain of aliases": (
        "\n".join(["a0: &a0 []", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 5000))]),
        "too many",
    ),
    "an alias of itself": ("a: &a [*a]", "part of"),
    "a merge of itself": ("a: &a {<<: *a}", "part of"),
    "flow nesting": ("[" * 100_000, f"more than {MAX_DEPTH} levels"),
    "mapping nesting": ("{a: " * 50_000, f"more than {MAX_DEPTH} levels"),
    "block nesting": ("\n".join(" " * n + "a:" for n in range(1000)), f"more than {MAX_DEPTH} levels"),
    "an explicit tag": ("a: !!int ''", "tag or form"),
    "a tag of another type": ("a: !!timestamp x", "tag or form"),
    "a truth value that is none": ("a: !!bool perhaps", "tag or form"),
    "a number of base 60": ("a: " + "1:" * 100_000 + "1.5", "tag or form"),
    "a date that is none": ("a: 2001-99-99", "tag or form"),
    "python": ("a: !!python/object/apply:os.system [id]", "not YAML"),
    "a control character": ("a: 1\nb: \x1b[31m", "line 2: the character U+001B"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_is_refused_in_one_line_and_soon(name: str) -> None:
    text, expected = HOSTILE[name]
    with pytest.raises(UnusableFileError) as refused:
        parse_yaml(text)
    said = str(refused.value)
    assert expected in said
    assert said.isprintable()
    assert len(said) < 300


def test_ordinary_aliases_and_merges_are_read() -> None:
    text = "base: &b {port: 1}\nx: {<<: *b, y: 2}\nlist: &l [1, 2]\nz: [*l, *l]"
    assert parse_yaml(text) == {"base": {"port": 1}, "x": {"port": 1, "y": 2}, "list": [1, 2], "z": [[1, 2], [1, 2]]}


def test_a_long_list_without_aliases_is_read(file: Path) -> None:
    networks = [f"10.{n // 250}.{n % 250}.0/24" for n in range(10_000)]
    file.write_text(f"redirect: {{outbound: {{excludePortsForIPs: [{', '.join(networks)}]}}}}")
    assert len(config.load(files=[str(file)]).outbound_exclude_destinations) == 10_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: \0", "is not text (byte 3 is zero)"),
        (b"\xff\xfea\0", "is not text (byte 3 is zero)"),
        (b"a: \xff", "is not UTF-8 text (byte 3)"),
        (b"a: \xed\xa0\x80", "is not UTF-8 text (byte 3)"),
        (b"# " + b"x" * MAX_CONFIGURATION, f"is larger than {MAX_CONFIGURATION} bytes"),
    ],
)
def test_content_that_is_no_text(file: Path, content: bytes, expected: str) -> None:
    file.write_bytes(content)
    assert refusal(file) == expected


@pytest.mark.parametrize(
    "number", ["9" * 100_000, "-" + "9" * 5000, "0x" + "f" * 100_000, "0b" + "1" * 100_000, "1e999"]
)
def test_huge_numbers_are_one_short_complaint(file: Path, number: str) -> None:
    file.write_text(f"redirect: {{inbound: {{port: {number}}}}}")
    with pytest.raises(InputError) as refused:
        config.load(files=[str(file)])
    (problem,) = refused.value.problems
    assert "is not a port" in problem
    assert len(problem) < len(str(file)) + MAX_SHOWN + 100


def test_complaints_about_many_keys_end(file: Path) -> None:
    file.write_text("".join(f"redirect{n}: 1\n" for n in range(20_000)))
    with pytest.raises(InputError) as refused:
        config.load(files=[str(file)])
    assert len(refused.value.problems) == 101
    assert refused.value.problems[-1].endswith("there is more, which is left out here")


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\nerror: all is well", "\u202egpj.exe", "\udcff"])
def test_what_a_message_quotes_cannot_speak_to_the_terminal(file: Path, text: str) -> None:
    assert shown(text).isprintable()
    assert quoted(text).isprintable()
    assert quoted({text: 1}).isprintable()
    file.write_text(f"{{{_as_yaml(text)}: 1, engine: {_as_yaml(text)}, redirect: {_as_yaml(text)}}}")
    with pytest.raises(InputError) as refused:
        config.load(files=[str(file)], environ={f"TPCTL_{text}": "1", "TPCTL_ENGINE": text})
    assert all(problem.isprintable() for problem in refused.value.problems)


def _as_yaml(text: str) -> str:
    escaped = "".join(f"\\u{ord(char):04x}" for char in text if not 0xD800 <= ord(char) < 0xE000)
    return f'"{escaped}"'


def test_names_of_users_and_files_hold_nothing_that_does_not_print() -> None:
    for text in ("a\0b", "a\nb", "\x1b[1m", "\udc80"):
        for read in (read_text, read_path, lambda value, note: read_executables({"iptables": value}, note)):
            with pytest.raises(BadValueError):
                read(text, lambda note: None)


def test_a_name_with_a_zero_byte() -> None:
    assert refusal("a\0b") == "cannot be read: its name has a zero byte"


# -- other files -------------------------------------------------------------------------------------------------------


def test_zone_files_and_resolv_conf_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is larger than"):
        read_zone_file(Path("/dev/zero"), "mesh")
    with pytest.raises(HostError, match="is larger than"):
        read_resolv_conf("/dev/zero")
    (tmp_path / "hosts").write_bytes(b"10.0.0.1 a.mesh\0")
    with pytest.raises(InputError, match="is not text"):
        read_zone_file(tmp_path / "hosts", "mesh")
    assert ResolvConf(Path("/dev/zero")).current().servers == ()


def test_a_fifo_with_an_idle_writer_is_read_to_its_end(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)

    def write() -> None:
        with fifo.open("w") as stream:
            stream.write("a: ")
            stream.flush()
            time.sleep(0.2)
            stream.write("1\n")

    writer = threading.Thread(target=write)
    writer.start()
    assert read_configuration(str(fifo)) == "a: 1\n"
    writer.join()

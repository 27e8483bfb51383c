"""What a configuration may hold: texts that are made to hurt are refused in one line, and soon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.system import files_of_root
from tests.unit.system.files_of_root import NOBODY, needs_root, refusal
from tpctl.config import load as config
from tpctl.config.values import MAX_SHOWN, BadValueError, quoted, read_executables, read_path, read_text, shown
from tpctl.config.yaml_text import MAX_DEPTH, parse_yaml
from tpctl.host.resolvers import load as read_resolv_conf
from tpctl.relay.dns.resolvers import ResolvConf
from tpctl.relay.dns.zone_file import read_zone_file
from tpctl.system.errors import HostError, InputError
from tpctl.system.input_files import MAX_CONFIGURATION, UnusableFileError, judge_program

file = files_of_root.file


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
    "an alias of itself": ("a: &a [*a]", "refers to itself"),
    "a merge of itself": ("a: &a {<<: *a}", "refers to itself"),
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
    assert refused.value.problems[-1].endswith("there is more, which is not shown here")


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
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(InputError, match="is larger than"):
        read_zone_file(large, "mesh")
    with pytest.raises(HostError, match="is larger than"):
        read_resolv_conf(str(large))
    (tmp_path / "hosts").write_bytes(b"10.0.0.1 a.mesh\0")
    with pytest.raises(InputError, match="is not text"):
        read_zone_file(tmp_path / "hosts", "mesh")
    assert ResolvConf(large).current().servers == ()


# -- programs ----------------------------------------------------------------------------------------------------------


@needs_root
def test_programs_are_judged_like_configurations(tmp_path: Path) -> None:
    program = tmp_path / "iptables"
    program.write_text("#!/bin/sh\n")

    def refused() -> str:
        with pytest.raises(UnusableFileError) as found:
            judge_program(str(program))
        return str(found.value)

    assert refused() == "is no executable file"
    program.chmod(0o755)
    judge_program(str(program))
    (tmp_path / "link").symlink_to(program)
    judge_program(str(tmp_path / "link"))
    program.chmod(0o775)
    assert "mode 0775, and root runs only programs that nobody else may change" in refused()
    program.chmod(0o755)
    os.chown(program, NOBODY, NOBODY)
    assert f"belongs to uid {NOBODY}" in refused()
    os.chown(program, 0, 0)
    tmp_path.chmod(0o777)
    assert f"lies below {tmp_path}, which belongs to uid 0 and has mode 0777" in refused()
    tmp_path.chmod(0o755)
    program.rename(tmp_path / "moved")
    assert refused() == "cannot be run: No such file or directory"
    os.mkfifo(program, 0o700)
    assert refused() == "cannot be run: it is a FIFO, not a file"
    program.unlink()
    program.symlink_to(tmp_path / "moved")
    os.chown(program, NOBODY, NOBODY, follow_symlinks=False)
    assert "so that user decides what root runs" in refused()

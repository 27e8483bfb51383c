"""Text of the host: any bytes come in, the same bytes go out, and a terminal gets signs only."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.cli.printing.output import as_json
from tpctl.cli.printing.streams import Stream
from tpctl.system import child, runner, text

ODD = b"x\xffy \xe9 \xed\xa0\x80 \xf0\x9f\x98\x80"


@given(st.binary())
def test_any_bytes_come_back(raw: bytes) -> None:
    assert text.encoded(text.decoded(raw)) == raw


@given(st.binary())
def test_whatever_is_printed_is_printable(raw: bytes) -> None:
    shown = text.printable(text.decoded(raw))
    assert shown.replace("\n", "").replace("\t", "").isprintable() or "\x1b[" in shown
    shown.encode()


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"eth0 \xc3\xbc\n\t-", "eth0 ü\n\t-"),
        (b"x\xffy", r"x\xffy"),
        (b"\x1b]0;title\x07", r"\x1b]0;title\x07"),
        (b"\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
        (b"\x1b[2J\x1b[8mhidden", r"\x1b[2J\x1b[8mhidden"),
        ("\u202e\u2028\x85".encode(), r"\u202e\u2028\x85"),
        (b"a\rb\x0bc", r"a\rb\x0bc"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(raw: bytes, shown: str) -> None:
    assert text.printable(text.decoded(raw)) == shown


def test_json_holds_no_lone_surrogates(capsys: pytest.CaptureFixture[str]) -> None:
    as_json("Error", {"x\udcff": ["\udce9", ("ü \U0001f600", 1)]})
    found = json.loads(capsys.readouterr().out.encode())
    assert found == {"apiVersion": "tpctl/v1", "kind": "Error", r"x\xff": [r"\xe9", ["ü \U0001f600", 1]]}


def test_only_the_kernels_own_separators_count() -> None:
    named = "a\x1cb\x85c\u2028d\re"
    assert text.lines(f"one {named}\ntwo\n") == [f"one {named}", "two"]
    assert text.words(f"  one \t{named} two") == ["one", named, "two"]
    assert text.lines("") == []


def test_programs_are_given_and_give_any_bytes() -> None:
    odd = text.decoded(ODD)
    assert runner.run(["cat"], stdin=odd).stdout == odd
    assert runner.run(["printf", "%s", odd]).stdout == odd
    assert child.in_child(lambda: odd) == odd


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_stream_of_any_encoding_takes_any_name(encoding: str) -> None:
    raw = io.BytesIO()
    stream = Stream(io.TextIOWrapper(raw, encoding=encoding))
    stream.write(text.decoded(b"x\xffy \xe2\x82\xac\n"))
    stream.flush()
    assert raw.getvalue() == {"utf-8": "x\\xffy €\n".encode()}.get(encoding, b"x\\xffy \\u20ac\n")


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "LC_ALL": "POSIX"}]
)
def test_messages_about_odd_names_are_printed_everywhere(variables: dict[str, str], tmp_path: Path) -> None:
    name = text.encoded(f"{tmp_path}/ü") + b"\xff\x1b[2J"
    argv: list[str | bytes] = [sys.executable, "-m", "tpctl.cli.main", "install", "--print-config", "--config", name]
    done = subprocess.run(argv, capture_output=True, check=False, env={"PATH": "/usr/bin:/bin", **variables})
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(b"error: file ")
    assert b"\xff" not in done.stderr
    assert b"\x1b" not in done.stderr

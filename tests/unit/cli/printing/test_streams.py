"""What becomes of a command whose output nobody can have: a full disk, a reader that has gone, closed descriptors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tpctl.cli.printing.streams import Stream, fill_gaps

COMMAND = [sys.executable, "-m", "tpctl.cli.main"]
ROOT = Path(__file__).resolve().parents[4]
ASKED = ("explain", "outbound", "--to", "10.1.2.3:443", "--kuma-dp-user", "nobody")


def shell(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A script in which `"$@"` is the command."""
    argv = ["bash", "-c", script, "bash", *COMMAND, *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("words", [ASKED, ("install", "--print-config"), ("--version",), ("install", "--help")])
def test_a_result_that_cannot_be_printed_is_an_error(words: tuple[str, ...]) -> None:
    done = shell('"$@" > /dev/full', *words)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: the result cannot be printed: No space left on device; nothing was changed"
    )


@pytest.mark.parametrize("words", [ASKED, ("install", "--print-config"), ("install", "--help")])
def test_a_reader_that_has_seen_enough_is_none(words: tuple[str, ...]) -> None:
    done = shell('"$@" | true; echo "${PIPESTATUS[0]}"', *words)
    assert done.stdout == "0\n"
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: ")] == []


def test_errors_that_cannot_be_printed_change_no_exit_code() -> None:
    assert shell('"$@" 2> /dev/full', "install", "--wait", "x").returncode == 2
    assert shell('"$@" 2>&- >&- <&-', "install", "--wait", "x").returncode == 2


def test_a_configuration_from_a_closed_stdin_is_bad_input() -> None:
    done = shell('"$@" <&-', "install", "--print-config", "--config", "-")
    assert done.returncode == 2
    assert done.stderr == "error: file stdin: cannot be read: standard input is closed\n"


def test_no_file_gets_the_number_of_a_standard_stream() -> None:
    code = "from tpctl.cli.printing.streams import fill_gaps; import os; fill_gaps(); os._exit(os.open('/', os.O_PATH))"
    done = subprocess.run(["bash", "-c", '"$@" <&- 2>&-', "bash", sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 3


def test_open_streams_stay_what_they_are() -> None:
    before = [Path(f"/proc/self/fd/{number}").readlink() for number in (0, 1, 2)]
    fill_gaps()
    assert [Path(f"/proc/self/fd/{number}").readlink() for number in (0, 1, 2)] == before


def test_the_first_failure_is_kept_and_nothing_is_tried_again() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        stream = Stream(full)
        assert stream.write("something") == len("something")
        stream.flush()
        stream.flush()
        assert stream.error is not None
        assert stream.write("more") == len("more")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("install", "--no-such-flag"), r"No such option.*--no-such-flag.*\? See `tpctl install --help`"),
        (("intsall",), r"No such command 'intsall'. Did you mean 'install'\? See `tpctl --help`"),
        (("install", "--confirm-within", "60"), "Invalid value for '--confirm-within'"),
        (("explain", "inbound", "--to", "10.0.0.5:22"), "Missing option '--from'; see `tpctl explain inbound --help`"),
        (("persist", "--root", "/\x1b[2J\n" + "x" * 5000), "Invalid value for '--root'"),
    ],
)
def test_misused_words_are_one_short_line(words: tuple[str, ...], said: str) -> None:
    done = shell('"$@"', *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.match(f"error: {said}", done.stderr)
    assert len(done.stderr) < 400
    assert done.stderr.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "words",
    [
        ("install", "\x1b[2J"),
        ("uninstall", "\x1b[2J"),
        ("install", "--config", "/\x1b[2J"),
        ("install", "--confirm-within", "\x1b[2J"),
        ("install", "--confirm-within", "9" * 5000 + "h"),
        ("install", "--kuma-dp-user", "no-such-\u202euser", "--resolv-conf", "/\x1b[2J"),
        ("install", "--dataplane-file", "/\x1b[2J"),
        ("explain", "outbound", "--kuma-dp-user", "nobody", "--to", "\x1b[2J"),
        ("explain", "outbound", "--kuma-dp-user", "nobody", "--to", "1.2.3.4:\x1b[2J"),
        ("explain", "outbound", "--kuma-dp-user", "nobody", "--to", "1.2.3.4:5", "--uid", "\x1b[2J"),
        ("explain", "outbound", "--kuma-dp-user", "nobody", "--to", "1.2.3.4:5", "--interface", "\x1b[2J"),
    ],
)
def test_what_a_message_quotes_can_be_printed(words: tuple[str, ...]) -> None:
    done = shell('"$@"', *words)
    assert done.returncode == 2
    assert all(line.isprintable() and len(line) < 500 for line in done.stderr.splitlines())
    assert done.stdout == ""

"""A page as commands with what they print, and what of it is compared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_START = re.compile(r"<!-- play(?:, with (?P<program>\S+))? -->\n")
ELLIPSIS = "…"
_PART = re.compile(
    r"(?:<!-- needs: (?P<needs>\S+) -->\n)?"
    r"(?:<!-- play: (?P<hidden>.*?)-->"
    r"|<!-- write: (?P<file>\S+) -->\n```\w*\n(?P<content>.*?)```"
    r"|(?P<skipped><!-- not played: [^>]*-->\n)?```console\n(?P<shown>.*?)```)",
    re.DOTALL,
)
_COMMAND = re.compile(r"(?P<prompt>(?:[a-z]+(?:@[a-z]+)?)?[#$]) (?P<command>.+)")
_HOST = re.compile(r"[a-z]*#|\$")
"""Prompts on our host; others are those of another machine."""
_VARIES = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?"), "TIME"),
    (re.compile(r"\[\d\d/\w{3}/\d{4} \d\d:\d\d:\d\d\]"), "[TIME]"),
    (re.compile(r"\b[\d.]+ (?:m?s|(?:milli)?seconds?|minutes?)\b"), "SECONDS"),
    # Of an install, by a status that came at once.
    (re.compile(r"\bjust now \("), "SECONDS ago ("),
    (re.compile(r'("(?:seconds|pid)": )[\d.]+'), r"\1N"),
    (re.compile(r"(\bpid |\(process )\d+"), r"\1N"),
    # How far a probe was seen to get, and what conntrack still held, is a matter of milliseconds.
    (re.compile(r"\barrived \(.*"), "arrived"),
    (re.compile(r"\bremoved: \d+ rules"), "removed: N rules"),
    (re.compile(r"timestamp_seconds \d+"), "timestamp_seconds N"),
    (re.compile(r"curl/[\d.]+"), "curl"),
    (re.compile(r"Linux \d\S*|Python \d\S*"), "VERSION"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A command and what the page says it prints. `place` is where that stands in the page.

    `prompt` is the terminal in which it is typed; `needs` a program without which it is left out.
    """

    command: str
    place: tuple[int, int]
    said: str
    is_hidden: bool = False
    prompt: str = "#"
    needs: str | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is typed on another machine."""
        return _HOST.fullmatch(self.prompt) is None


def played() -> list[str]:
    """The pages that are played, by their paths below the top of the repository."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    return [str(page.relative_to(ROOT)) for page in pages if _START.search(page.read_text(encoding="utf-8"))]


def needed(page: str) -> str | None:
    """The program without which nothing of a page can be played."""
    start = _START.search(page)
    return start and start["program"]


def steps(page: str) -> Iterator[Step]:
    """The commands of a page, in order."""
    start = _START.search(page)
    assert start is not None
    for part in _PART.finditer(page, start.end()):
        if part["hidden"]:
            yield Step(part["hidden"].strip(), part.span("hidden"), "", is_hidden=True, needs=part["needs"])
        elif part["file"]:
            command = f"cat >{part['file']} <<'END OF FILE'\n{part['content']}END OF FILE"
            yield Step(command, part.span("content"), "", is_hidden=True, needs=part["needs"])
        elif not part["skipped"]:
            yield from _block(part["shown"], part.start("shown"), part["needs"])


def _block(text: str, offset: int, needs: str | None) -> Iterator[Step]:
    lines = text.splitlines(keepends=True)
    other = "#" if text.startswith("$") else "$"
    number = 0
    while number < len(lines):
        match = _typed(lines[number], other)
        assert match, f"not a command: {lines[number]}"
        offset += len(lines[number])
        number += 1
        command = match["command"]
        while command.endswith("\\") or _has_open_document(command):
            command += "\n" + lines[number].rstrip("\n")
            offset += len(lines[number])
            number += 1
        said = ""
        while number < len(lines) and not _typed(lines[number], other):
            said += lines[number]
            number += 1
        yield Step(command, (offset, offset + len(said)), said, prompt=match["prompt"], needs=needs)
        offset += len(said)


def _typed(line: str, other: str) -> re.Match[str] | None:
    """A line with a prompt. A block has one of `# ` and `$ `: the `other` one begins a line of some output."""
    match = _COMMAND.fullmatch(line.rstrip("\n"))
    return None if match is None or match["prompt"] == other else match


def _has_open_document(command: str) -> bool:
    """Whether a here-document (`<<'END'`) has not ended yet."""
    word = re.search(r"<<'(\w+)'", command)
    return word is not None and command.splitlines()[-1] != word[1]


def agrees(said: str, printed: str) -> bool:
    """Whether a command printed what the page says, but for what differs from run to run."""
    parts = [re.escape(_plain(part)) for part in re.split(rf"^ *{ELLIPSIS}\n", said, flags=re.MULTILINE)]
    return re.fullmatch(".*".join(parts), _plain(printed), re.DOTALL) is not None


def _plain(text: str) -> str:
    for pattern, stands in _VARIES:
        text = pattern.sub(stands, text)
    return re.sub(r"[ \t]+$|(?<=\S) {2,}", " ", text, flags=re.MULTILINE)


def rewritten(page: str, results: list[tuple[Step, str]]) -> str:
    """The page with what the commands printed, where it does not agree."""
    for step, printed in reversed(results):
        if not step.is_hidden and not agrees(step.said, printed):
            begin, end = step.place
            page = page[:begin] + printed + page[end:]
    return page

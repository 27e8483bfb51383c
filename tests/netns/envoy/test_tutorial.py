"""The tutorials with Envoy, typed as they are printed, on our host and its peer; each output is the one on the page."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import PEER4, RELAY_USER, Net

pytestmark = pytest.mark.root
PROMPT = re.compile(r"(\w+[#$]) (.*)")
"""Of root, on our host, or of somebody on another machine."""
BEGIN = """
shopt -s expand_aliases
export HOME=$PWD
tpctl() {{ {python} -m tpctl.cli.main "$@"; }}
ssh() {{ shift; "$@"; }}
scp() {{ shift; while [ $# -gt 1 ]; do cp "${{1#*:}}" "${{@: -1}}"; shift; done; }}
exec 2>&1
"""
"""The other machine's files are here: ssh and scp stay on this one."""
END = "that was its output"


class Terminal:
    """A shell in a namespace."""

    def __init__(self, net: str, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT_DIRECTORY / "agent"), "LC_ALL": "C"}
        self._shell = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{net}", "bash", "--norc"], text=True, cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0,
        )  # fmt: skip
        self.type(BEGIN.format(python=sys.executable))

    def type(self, command: str) -> list[str]:
        """Type a command; the lines that it prints."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command}\necho; echo {END}\n")
        self._shell.stdin.flush()
        patience = threading.Timer(2 * relay_net.PATIENCE, self._end)  # then there is nothing more to read
        patience.start()
        lines = []
        for line in self._shell.stdout:
            if line.strip() == END:
                break
            lines.append(line.rstrip("\n"))
        patience.cancel()
        return [line for line in lines if line]

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGTERM)

    def close(self) -> None:
        """End it and what it has started."""
        self._end()
        self._shell.communicate()


def steps(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """The prompt, the command and the output of each, in order."""
    found: list[tuple[str, str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            prompt = PROMPT.fullmatch(line)
            if prompt is not None:
                found.append((prompt[1], prompt[2], []))
            else:
                found[-1][2].append(line)
    return iter(found)


@pytest.fixture
def net() -> Iterator[Net]:
    with relay_net.network(redirect=False, passthrough6=False) as made:
        relay_net.run("ip", "-n", made.host, "route", "add", "default", "via", PEER4)
        yield made


@pytest.mark.parametrize("page", ["envoy-tutorial.md", "envoy-gateway.md"])
def test_every_command_does_what_is_printed(net: Net, page: str) -> None:
    with relay_net.public_directory() as folder, contextlib.ExitStack() as stack:
        text = (
            (ROOT_DIRECTORY / "docs" / page)
            .read_text(encoding="utf-8")
            .replace("/etc/tpctl", f"{folder}/etc")
            .replace("/srv", str(folder))
        )
        text = re.sub(r"(?<!-)kuma-dp(?!-)", RELAY_USER, text).replace(f"root:{RELAY_USER}", "root:nogroup")
        text = text.replace("/tmp/envoy.log", f"{folder}/envoy.log").replace(
            f"--user {RELAY_USER}", f"--user {RELAY_USER} --folder {folder}/run"
        )
        (folder / "etc").mkdir()
        example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
        assert example is not None
        (folder / "etc/envoy.yaml").write_text(example[1])
        terminals: dict[str, Terminal] = {}
        for prompt, command, expected in steps(text):
            if prompt not in terminals:
                terminals[prompt] = Terminal(net.host if prompt.endswith("#") else net.peer, folder)
                stack.callback(terminals[prompt].close)
            said = terminals[prompt].type(command)
            shown = [line for line in said if not line.startswith(("warning: ", "note: ", "[1]"))]
            log = folder / "envoy.log"
            assert shown == expected, (command, log.read_text() if log.exists() else "")

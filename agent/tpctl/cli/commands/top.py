"""`tpctl top`: a live view of the relay."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tpctl.relay.figures.reckoning import View
    from tpctl.relay.settings.listen import Address

DEFAULT_CONFIG = Path("/etc/tpctl/relay.yaml")
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
"""ECMA-48: cursor to the top, erase to the end of the line, erase to the end of the screen."""

EXAMPLE = """\b
Examples:
  tpctl top --metrics 127.0.0.1:9902
  tpctl top --config /etc/tpctl/relay.yaml --interval 5
  tpctl top --metrics unix:/run/tpctl-relay/metrics.sock --json --once | jq '.listeners[].open'

\b
Exit codes: 0 done, or interrupted; 2 bad input, or no relay tells its metrics there.
"""


@click.command("top", epilog=EXAMPLE)
@click.option("--metrics", metavar="ADDRESS", help="Where the relay serves its metrics, as its own --metrics.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"Instead of --metrics: the relay's configuration. Without either, {DEFAULT_CONFIG}.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two readings; rates are over this time.",
)
@click.option("--once", is_flag=True, help="Show one reading, after one interval, and exit.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each reading; with --once, one document.")
def command(metrics: str | None, config: Path | None, interval: float, once: bool, as_json: bool) -> int:
    """Watch the relay: its connections, bytes, errors, DNS queries and clients, until interrupted.

    The figures are those that the relay serves for Prometheus, of all its workers.
    """
    from tpctl.system.errors import HostError

    try:
        address = _address(metrics, config)
        for number, view in enumerate(_views(address, interval)):
            if once and not number:
                continue  # there are no rates yet
            if once and isinstance(view, str):
                raise HostError(view)
            _show(view, address, once=once, as_json=as_json)
            if once:
                break
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _address(metrics: str | None, config: Path | None) -> Address:
    """Where to ask. Raises InputError."""
    from tpctl.config.values import BadValueError
    from tpctl.relay.settings.file import load
    from tpctl.relay.settings.listen import read_address
    from tpctl.system.errors import InputError

    if metrics is not None:
        if config is not None:
            raise InputError("--metrics and --config: use only one of them")
        try:
            return read_address(metrics)
        except BadValueError as bad:
            raise InputError([f"--metrics: {problem}" for problem in bad.problems]) from None
    if config is None and not DEFAULT_CONFIG.exists():
        raise InputError(
            f"where does the relay serve its metrics? Give --metrics ADDRESS or --config FILE; {DEFAULT_CONFIG} "
            "does not exist"
        )
    path = config or DEFAULT_CONFIG
    found = load(str(path)).metrics
    if found is None:
        raise InputError(f"file {path}: metrics: is missing, so the relay serves none; write metrics: 127.0.0.1:9902")
    return found


def _views(address: Address, interval: float) -> Iterator[View | str]:
    """What is to be shown, again and again; a text while a relay that was there does not answer.

    Raises HostError when it does not answer in the beginning.
    """
    from tpctl.relay.figures.reading import NoAnswerError, read
    from tpctl.relay.figures.reckoning import Figures, view
    from tpctl.system.errors import HostError

    before: Figures | None = None
    began = read_at = time.monotonic()
    first = True
    while True:
        now: Figures | None = None
        try:
            now = read(address)
        except NoAnswerError as error:
            if first:
                raise HostError(f"{error}; `tpctl relay` serves them with --metrics") from None
            yield str(error)
        else:
            at = time.monotonic()
            yield view(now, before, at - read_at)
            read_at = at
        before, first = now, False
        began = max(began + interval, time.monotonic())
        time.sleep(max(0.0, began - time.monotonic()))


def _show(picture: View | str, address: Address, *, once: bool, as_json: bool) -> None:
    import json
    import shutil

    from tpctl.cli.printing import output
    from tpctl.relay.figures import view as top_view
    from tpctl.relay.settings.listen import show

    where = show(address)
    if as_json:
        data = {"metrics": where, "problem": picture} if isinstance(picture, str) else top_view.document(picture, where)
        click.echo(json.dumps(output.document("Top", data), indent=2 if once else None))
    else:
        lines = [picture] if isinstance(picture, str) else top_view.lines(picture, where, time.time())
        if once or not _can_redraw():
            click.echo("\n".join([*lines, *([] if once else [""])]))
        else:
            size = shutil.get_terminal_size()
            fitting = top_view.fit(lines, size.columns, size.lines - 1)
            click.echo(_HOME + "".join(f"{line}{_REST_OF_LINE}\n" for line in fitting) + _REST_OF_SCREEN, nl=False)
    sys.stdout.flush()


def _can_redraw() -> bool:
    """Whether stdout is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "")

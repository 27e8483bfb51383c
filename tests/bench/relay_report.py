"""What `make bench-relay` found, as tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.engines import spread
from tests.bench.picture import Panel, picture

PLANES = ("relay", "haproxy", "envoy", "nginx", "none")
ON_REQUEST = ("sockmap", "envoy-tcp", "envoy-http")
"""The relay with --accelerate sockmap; Envoy as `tpctl envoy` configures it, without and with requests read as HTTP."""
PEERS = ("haproxy", "envoy", "nginx")


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured: bulk streams in a direction, or requests over so many connections."""

    name: str
    goal: float
    """The rate beside the best peer's."""
    streams: int = 0
    direction: str = ""
    connections: int = 0
    new: bool = False

    @property
    def unit(self) -> str:
        """Of the rate."""
        if self.streams:
            return "Gb/s"
        return "connections/s" if self.new else "requests/s"

    @property
    def per(self) -> str:
        """What CPU time is divided by."""
        if self.streams:
            return "ms/GB"
        return "us/connection" if self.new else "us/request"


CELLS = (
    Cell("bulk, upload, 1 stream", 1.15, streams=1, direction="upload"),
    Cell("bulk, download, 1 stream", 1.15, streams=1, direction="download"),
    Cell("bulk, upload, 8 streams", 1.15, streams=8, direction="upload"),
    Cell("bulk, download, 8 streams", 1.15, streams=8, direction="download"),
    Cell("new connections, 32 at a time", 1.05, connections=32, new=True),
    Cell("keep-alive requests, 32 connections", 1.05, connections=32),
    Cell("keep-alive requests, 512 connections", 1.05, connections=512),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one measurement."""

    rate: float
    cpu: float
    """The data plane's, in the cell's unit: milliseconds for a GB, microseconds for a connection or request."""
    everybody: float
    """The same of client, data plane and server together."""
    median: float = 0.0
    slow: float = 0.0
    """Milliseconds below which half, and 99 of 100 requests stay; 0 for bulk."""


@dataclass(slots=True)
class Results:
    """All measurements."""

    figures: dict[tuple[str, str], list[Figures]] = field(default_factory=dict)
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Megabytes without connections and with the idle ones."""

    def add(self, plane: str, cell: Cell, figures: Figures) -> None:
        """One more measurement."""
        self.figures.setdefault((plane, cell.name), []).append(figures)

    def of(self, plane: str, cell: Cell, what: str) -> list[float]:
        """Round by round."""
        return [getattr(one, what) for one in self.figures.get((plane, cell.name), [])]

    def middle(self, plane: str, cell: Cell, what: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.of(plane, cell, what))

    def ratios(self, peer: str, cell: Cell, what: str) -> list[float]:
        """The relay's to a peer's, round by round."""
        pairs = zip(self.of("relay", cell, what), self.of(peer, cell, what), strict=True)
        return [mine / theirs for mine, theirs in pairs]

    def planes(self, cell: Cell) -> list[str]:
        """Those that were measured."""
        return [plane for plane in (*PLANES, *ON_REQUEST) if self.of(plane, cell, "rate")]


def _table(results: Results, cell: Cell) -> None:
    heads = (cell.unit, "relay / it", cell.per, "relay / it", "all, " + cell.per, "it / relay")
    widths = (24, 18, 24, 18, 24, 18)
    tail = "" if cell.streams else f"{'p50 ms':>9}{'p99 ms':>9}"
    print(f"\n{cell.name}")
    print(f"  {'':<11}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)) + tail)
    forms = {"rate": "{:.2f}" if cell.streams else "{:.0f}"}
    for plane in results.planes(cell):
        words = []
        for what in ("rate", "cpu", "everybody"):
            shown = plane != "none" or what != "cpu"
            words.append(spread(results.of(plane, cell, what), forms.get(what, "{:.0f}")) if shown else "")
            compared = shown and plane != "relay" and results.of("relay", cell, "rate")
            ratios = results.ratios(plane, cell, what) if compared else []
            if what == "everybody":
                ratios = [1 / ratio for ratio in ratios]
            words.append(spread(ratios, "{:.2f}") if ratios else "")
        line = "".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True))
        if not cell.streams:
            line += "".join(f"{results.middle(plane, cell, what):>9.2f}" for what in ("median", "slow"))
        print(f"  {plane:<11}{line}")


def _goals(results: Results, cell: Cell) -> list[str]:
    """How the relay fares beside the best peer."""
    peers = [plane for plane in PEERS if plane in results.planes(cell)]
    if not peers or "relay" not in results.planes(cell):
        return []

    def line(what: str, ratio: float, goal: float, *, more: bool, peer: str) -> str:
        met = "met" if (ratio >= goal if more else ratio <= goal) else "SHORT"
        sign = ">=" if more else "<="
        return f"  {cell.name + ', ' + what:<62}{ratio:>6.2f} of {peer:<8} ({sign} {goal:.2f}: {met})"

    best = max(peers, key=lambda plane: results.middle(plane, cell, "rate"))
    ratio = statistics.median(results.ratios(best, cell, "rate"))
    lean = min(peers, key=lambda plane: results.middle(plane, cell, "everybody"))
    by_cpu = 1 / statistics.median(results.ratios(lean, cell, "everybody"))
    lines = [
        line("rate", ratio, cell.goal, more=True, peer=best),
        line("rate by the CPU time of all", by_cpu, cell.goal, more=True, peer=lean),
    ]
    if not cell.streams:
        quick = min(peers, key=lambda plane: results.middle(plane, cell, "slow"))
        slow = statistics.median(results.ratios(quick, cell, "slow"))
        lines.append(line("p99", slow, 1.0, more=False, peer=quick))
    if cell.new:
        for peer, goal in (("envoy", 1.0), ("haproxy", 1.5)):
            if peer in peers:
                cpu = statistics.median(results.ratios(peer, cell, "cpu"))
                lines.append(line("CPU of each", cpu, goal, more=False, peer=peer))
    return lines


def show(results: Results, cells: Sequence[Cell], idle: int) -> None:
    """Print everything."""
    print("median (lowest-highest) over the rounds; nginx has fixed upstreams, the others ask where a connection went")
    print("all: CPU time of client, data plane and server together")
    for cell in cells:
        _table(results, cell)
    lines = [line for cell in cells for line in _goals(results, cell)]
    if results.memory:
        print(f"\nmemory, MB (PSS of all processes){'':<8}without connections{'':<4}with {idle} idle{'':<4}KB for each")
        for plane, (before, after) in results.memory.items():
            print(f"  {plane:<38}{before:>21.1f}{after:>18.1f}{(after - before) * 1024 / idle:>15.2f}")
        peers = {plane: after for plane, (_, after) in results.memory.items() if plane in PEERS}
        if peers and "relay" in results.memory:
            best = min(peers, key=lambda plane: peers[plane])
            ratio = results.memory["relay"][1] / peers[best]
            name = f"memory with {idle} idle connections"
            lines.append(f"  {name:<62}{ratio:>6.2f} of {best:<8} (<= 1.00: {'met' if ratio <= 1 else 'SHORT'})")
    if lines:
        print("\nthe relay beside the best peer", *lines, sep="\n")


def draw(results: Results, path: Path, note: str) -> None:
    """Write the picture."""
    panels = []
    for cell in CELLS:
        values = {plane: results.of(plane, cell, "rate") for plane in results.planes(cell)}
        if values:
            panels.append(Panel(f"{cell.name}, {cell.unit}", values))
    for cell in (one for one in CELLS if one.new or one.streams == 1):
        values = {plane: results.of(plane, cell, "cpu") for plane in results.planes(cell) if plane != "none"}
        if values:
            panels.append(Panel(f"CPU, {cell.name}, {cell.per}", values, less_is_better=True))
    if results.memory:
        sizes = {plane: [after] for plane, (_, after) in results.memory.items()}
        panels.append(Panel("memory with idle connections, MB", sizes, less_is_better=True))
    path.write_text(picture(panels, note))

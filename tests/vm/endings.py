"""Who ended a connection: what a capture of the machine's network card shows. `python -m tests.vm.endings FILE`.

A RST from the machine's address was sent by its kernel, whoever made it do so; one from another address by qemu's user
network, which ends a connection of the machine's when this host's side does. Nothing else is between the two.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

_FILE_HEADER = 24
_RECORD = struct.Struct("=IIII")
"""Seconds, microseconds, bytes kept, bytes there were (pcap-savefile(5)); qemu writes them in this machine's order."""
_ETHERNET = 14
_TCP = 6
_FIN, _SYN, _RST = 0x01, 0x02, 0x04
_ENDS = {_FIN: "FIN", _RST: "RST"}


class Ends(NamedTuple):
    """A segment's source and destination."""

    source: str
    source_port: int
    destination: str
    destination_port: int

    def reversed(self) -> Ends:
        """Of the answer."""
        return Ends(self.destination, self.destination_port, self.source, self.source_port)

    def __str__(self) -> str:
        return f"{self.source} {self.source_port} > {self.destination} {self.destination_port}"


@dataclass(slots=True)
class Connection:
    """What was seen of one. Times are seconds of the machine's clock."""

    ends: Ends
    began: float
    segments: int = 0
    last: float = 0.0
    closing: list[str] = field(default_factory=list)
    """The segments with FIN or RST: when, which, and from whom. A repeated one is there once."""

    def __str__(self) -> str:
        closing = "; ".join(self.closing) or "nobody ended it"
        return f"{self.ends}: {self.segments} segments from {self.began:.3f} s to {self.last:.3f} s; {closing}"


def connections(capture: bytes) -> list[Connection]:
    """Every TCP connection of a capture, in the order of their first segments. A SYN begins one."""
    running: dict[Ends, Connection] = {}
    found: list[Connection] = []
    for at, ends, flags in _segments(capture):
        connection = running.get(ends) or running.get(ends.reversed())
        if connection is None or (flags & _SYN and connection.closing):
            connection = Connection(ends, at)
            running.pop(ends.reversed(), None)
            running[ends] = connection
            found.append(connection)
        connection.segments += 1
        connection.last = at
        for flag, name in _ENDS.items():
            who = f"{name} from {ends.source} {ends.source_port}"
            if flags & flag and not any(one.startswith(who) for one in connection.closing):
                connection.closing.append(f"{who} at {at:.3f} s")
    return found


def _segments(capture: bytes) -> Iterator[tuple[float, Ends, int]]:
    """When, between whom, and with which flags. What is cut off in the end is left out."""
    at = _FILE_HEADER
    while at + _RECORD.size <= len(capture):
        seconds, microseconds, kept, _ = _RECORD.unpack_from(capture, at)
        at += _RECORD.size
        if segment := _segment(capture[at : at + kept]):
            yield (seconds + microseconds / 1e6, *segment)
        at += kept


def _segment(frame: bytes) -> tuple[Ends, int] | None:
    """RFC 791, RFC 8200 without extension headers, RFC 9293; None for anything else."""
    packet = frame[_ETHERNET:]
    if len(packet) >= 20 and packet[0] >> 4 == 4 and packet[9] == _TCP:
        source, destination, segment = packet[12:16], packet[16:20], packet[(packet[0] & 15) * 4 :]
    elif len(packet) >= 40 and packet[0] >> 4 == 6 and packet[6] == _TCP:
        source, destination, segment = packet[8:24], packet[24:40], packet[40:]
    else:
        return None
    if len(segment) < 14:
        return None
    source_port, destination_port = struct.unpack_from("!HH", segment)
    return Ends(str(ip_address(source)), source_port, str(ip_address(destination)), destination_port), segment[13]


def main() -> None:
    """Print the connections of the files that are named."""
    for name in sys.argv[1:]:
        for connection in connections(Path(name).read_bytes()):
            print(connection)


if __name__ == "__main__":
    main()

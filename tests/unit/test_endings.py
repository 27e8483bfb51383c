"""The captures of the virtual machines' scenarios: who is said to have ended a connection."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from tests.vm.endings import connections

FIN, SYN, RST, ACK = 1, 2, 4, 16
HOST, MACHINE = "10.0.2.2", "10.0.2.15"
HOST6, MACHINE6 = "fd15::2", "fd15::15"


def frame(source: str, source_port: int, destination: str, destination_port: int, flags: int) -> bytes:
    segment = struct.pack("!HHIIBBHHH", source_port, destination_port, 1, 1, 5 << 4, flags, 64000, 0, 0)
    ends = ip_address(source).packed + ip_address(destination).packed
    if len(ends) == 8:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + ends
        return bytes(12) + b"\x08\x00" + header + segment
    return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 20, 6, 64) + ends + segment


def capture(*frames: bytes) -> bytes:
    records = (struct.pack("=IIII", at, 500000, len(one), len(one)) + one for at, one in enumerate(frames, 1))
    return struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 96, 1) + b"".join(records)


def test_who_sent_the_first_fin_and_who_the_reset() -> None:
    there, back = (HOST, 40000, MACHINE, 22), (MACHINE, 22, HOST, 40000)
    (found,) = connections(
        capture(
            frame(*there, SYN),
            frame(*back, SYN | ACK),
            frame(*back, FIN | ACK),
            frame(*back, FIN | ACK),
            frame(*there, RST),
        )
    )
    assert found.closing == ["FIN from 10.0.2.15 22 at 3.500 s", "RST from 10.0.2.2 40000 at 5.500 s"]
    assert (found.segments, found.began, found.last) == (5, 1.5, 5.5)


def test_a_running_connection_has_not_ended_and_a_port_can_be_used_again() -> None:
    frames = [
        frame(HOST6, 40000, MACHINE6, 22, SYN),
        frame(MACHINE6, 22, HOST6, 40000, RST | ACK),
        frame(HOST6, 40000, MACHINE6, 22, SYN),
        frame(MACHINE6, 22, HOST6, 40000, SYN | ACK),
    ]
    ended, running = connections(capture(*frames))
    assert ended.closing == ["RST from fd15::15 22 at 2.500 s"]
    assert running.closing == []
    assert "nobody ended it" in str(running)


def test_other_traffic_and_a_record_that_was_cut_off() -> None:
    udp = bytearray(frame(HOST, 53, MACHINE, 53, 0))
    udp[14 + 9] = 17
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    whole = capture(bytes(udp), arp, frame(HOST, 40000, MACHINE, 22, SYN), frame(MACHINE, 22, HOST, 40000, FIN))
    (found,) = connections(whole[:-30])
    assert found.segments == 1

"""resolv.conf, beside what the C library of this machine makes of it."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tpctl.host.resolvers import DEFAULT, load, parse
from tpctl.spec.policy import NameServer
from tpctl.system import text
from tpctl.system.errors import HostError


def servers(content: str) -> list[str]:
    return [str(server) for server in parse(content).servers]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", ["127.0.0.1"]),
        ("nameserver 10.0.0.53\n", ["10.0.0.53"]),
        ("search a b\nnameserver 10.0.0.53\noptions ndots:5\nnameserver fd00::53", ["10.0.0.53", "fd00::53"]),
        ("# nameserver 1.1.1.1\n; nameserver 1.1.1.2\nnameserver\t1.1.1.3 # router", ["1.1.1.3"]),
        ("nameserver\nnameserver x\nnameserver 1.1.1.256\nnameservers 1.1.1.1\nNAMESERVER 1.1.1.1", ["127.0.0.1"]),
        ("nameserver fe80::1%eth0\nnameserver fe80::1%eth1", ["fe80::1%eth0", "fe80::1%eth1"]),
        ("nameserver fd00::1%eth0", ["fd00::1"]),
        ("nameserver ::ffff:10.0.0.1", ["10.0.0.1"]),
        ("nameserver 127.1\nnameserver 010.0.0.1\nnameserver 0x7f.513", ["127.0.0.1", "8.0.0.1", "127.0.2.1"]),
        ("nameserver 0\nnameserver ::", ["127.0.0.1", "::1"]),
        ("nameserver 1.1.1.1\nnameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3", ["1.1.1.1", "1.1.1.2"]),
        ("nameserver x\nnameserver 1.1.1.1\n nameserver 1.1.1.2\nnameserver 1.1.1.3", ["1.1.1.1", "1.1.1.3"]),
    ],
)  # fmt: skip
def test_name_servers(content: str, wanted: list[str]) -> None:
    assert servers(content) == wanted
    assert parse(content).is_default == (wanted == ["127.0.0.1"] and not content.startswith("nameserver 127"))


@pytest.mark.parametrize(
    ("line", "remark"),
    [
        (" nameserver 192.0.2.1", "the keyword does not begin the line"),
        ("nameserver 192.0.2.1\r", "there is a carriage return after the address"),
        ("nameserver\t", "there is no address"),
        ("nameserver 192.0.2.256", "192.0.2.256 is not an address"),
        ("nameserver dns.example # x", "dns.example is not an address"),
        ("Nameserver 192.0.2.1", 'the keyword is "nameserver"'),
        ("nameservers 192.0.2.1", 'the keyword is "nameserver"'),
        ("nameserver 192.0.513", '"nameserver 192.0.513" means 192.0.2.1'),
        ("nameserver 192.0.2.4", "no more than 3 servers are asked"),
    ],
)
def test_what_is_skipped_or_means_something_else_is_said(line: str, remark: str) -> None:
    before = "# comment\nnameserver 192.0.2.7\n" + "nameserver 192.0.2.8\n" * (2 if "asked" in remark else 1)
    (said,) = parse(f"{before}{line}\n").remarks
    assert said.startswith(f"line {before.count(chr(10)) + 1}: ")
    assert remark in said


def test_nothing_is_said_of_what_is_as_it_looks() -> None:
    content = (
        "# nameserver\n\nsearch nameserver.example\nnameserver 192.0.2.1 # x\nnameserver FE80::1%eth0\noptions edns0"
    )
    assert parse(content).remarks == ()


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_bytes(b"# caf\xe9\nnameserver 1.1.1.1\n")
    assert [str(server) for server in load(str(path)).servers] == ["1.1.1.1"]
    path.chmod(0o600)
    assert "not every user may read it" in load(str(path)).remarks[0]
    with pytest.raises(HostError, match=f"{tmp_path} cannot be read: "):
        load(str(tmp_path))


def test_a_file_that_does_not_exist_is_as_good_as_an_empty_one(tmp_path: Path) -> None:
    link = tmp_path / "resolv.conf"
    link.symlink_to(tmp_path / "none")
    for path in (tmp_path / "none", link, Path(__file__) / "none"):
        found = load(str(path))
        assert (found.servers, found.is_default, found.remarks) == ((DEFAULT,), True, ("there is no such file",))


# -- the C library itself ----------------------------------------------------------------------------------------------

# A process of its own, in a mount namespace where /etc is empty. glibc remembers the file, so each is read by a child.
ASKING = """
import ctypes, json, os, socket, sys

class Address4(ctypes.Structure):
    _fields_ = [("family", ctypes.c_uint16), ("port", ctypes.c_uint16), ("address", ctypes.c_ubyte * 4),
                ("zero", ctypes.c_ubyte * 8)]

class Address6(ctypes.Structure):
    _fields_ = [("family", ctypes.c_uint16), ("port", ctypes.c_uint16), ("flow", ctypes.c_uint32),
                ("address", ctypes.c_ubyte * 16), ("scope", ctypes.c_uint32)]

class Extended(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint16), ("map", ctypes.c_uint16 * 3), ("sockets", ctypes.c_int * 3),
                ("count6", ctypes.c_uint16), ("init", ctypes.c_uint16), ("servers", ctypes.POINTER(Address6) * 3),
                ("reserved", ctypes.c_uint * 2)]

class State(ctypes.Structure):  # struct __res_state of glibc (resolv/bits/types/res_state.h)
    _fields_ = [("retrans", ctypes.c_int), ("retry", ctypes.c_int), ("options", ctypes.c_ulong),
                ("count", ctypes.c_int), ("servers", Address4 * 3), ("id", ctypes.c_ushort),
                ("search", ctypes.c_void_p * 7), ("domain", ctypes.c_char * 256), ("code", ctypes.c_ulong),
                ("bits", ctypes.c_uint), ("sort", ctypes.c_uint32 * 20), ("hooks", ctypes.c_void_p * 2),
                ("error", ctypes.c_int), ("socket", ctypes.c_int), ("flags", ctypes.c_uint), ("extended", Extended),
                ("beyond", ctypes.c_ubyte * 512)]

library = ctypes.CDLL("libresolv.so.2")
assert ctypes.CDLL(None).unshare(0x20000) == 0
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(None, b"/", None, 0x4000 | 0x40000, None) == 0, "private"
assert libc.mount(b"tmpfs", b"/etc", b"tmpfs", 0, None) == 0, os.strerror(ctypes.get_errno())

def asked():
    state = State()
    assert library.__res_ninit(ctypes.byref(state)) == 0
    for place in range(state.count):
        six = state.extended.servers[place]
        if six:
            yield [socket.inet_ntop(socket.AF_INET6, bytes(six.contents.address)), six.contents.scope]
        else:
            yield [socket.inet_ntop(socket.AF_INET, bytes(state.servers[place].address)), 0]

print("ready", flush=True)
for line in sys.stdin:
    with open("/etc/resolv.conf", "wb") as stream:
        stream.write(bytes.fromhex(line))
    child = os.fork()
    if not child:
        print(json.dumps(list(asked())), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


class Library:
    """glibc, and which servers it asks with a given resolv.conf."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def servers(self, content: bytes) -> list[NameServer]:
        """Those that packets go to: as `parse` has them, but with an interface's number for its name."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{content.hex()}\n")
        self._process.stdin.flush()
        found: list[tuple[str, int]] = json.loads(self._process.stdout.readline())
        return list(dict.fromkeys(_reached(ip_address(address), scope) for address, scope in found))


def _reached(address: IPv4Address | IPv6Address, scope: int) -> NameServer:
    plain = (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address
    if plain.is_unspecified:
        plain = ip_address("127.0.0.1" if plain.version == 4 else "::1")
    return NameServer(plain, str(scope) if scope and plain.is_link_local else None)


def _numbered(server: NameServer) -> NameServer:
    """glibc takes a name that is no interface's, and no number, for none at all."""
    if server.interface is None:
        return server
    with contextlib.suppress(OSError, ValueError):
        return NameServer(server.address, str(socket.if_nametoindex(server.interface)))
    number = int(server.interface) if re.fullmatch("[0-9]+", server.interface) else 0
    return NameServer(server.address, str(number) if 0 < number < 1 << 32 else None)


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    argv = [sys.executable, "-c", ASKING]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Library(process)
        process.communicate("")


WORDS = st.sampled_from(
    ["127.1", "010.0.0.1", "0x7f000001", "1.1.1.256", "1.2.3.4.5", "256", "4294967295", "4294967296", "0", "08.1",
     "0x", "1..2", "1.", "10.0.0.53", "192.0.2.1", "192.0.2.2", "::", "::1", "::ffff:10.0.0.1", "::ffff:0.0.0.0",
     "fd00::1", "FD00::1", "fe80::1", "fe80::1%lo", "fe80::1%1", "fe80::1%nope", "fe80::1%", "fd00::1%lo", "[::1]",
     "ff02::1%lo", "%lo", "dns.example", "1.1.1.1:53", "+1.1.1.1", "1.1.1.1\0", "\0", "1.1.1.1\v", "1.1.1.1\f9"]
) | st.text("0123456789abxX.:%+- \t\r\0\v", max_size=20)  # fmt: skip
KEYWORDS = st.sampled_from(
    ["nameserver"] * 8 + ["Nameserver", "nameservers", "nameserver\0", "search", "options", "#", ";"]
)
BLANKS = st.sampled_from([" "] * 4 + ["\t", "  ", " \t ", "", "\r", "\v", "\xa0"])
ENDS = st.sampled_from(["\n"] * 6 + ["\r\n", " # x\n", "\t;\n", "\n\n", "", " \r\n", "\0\n"])
LEADING = st.sampled_from([""] * 8 + [" ", "\t", "#", "\0", "\ufeff"])
LINES = st.tuples(LEADING, KEYWORDS, BLANKS, WORDS, ENDS).map("".join)


@pytest.mark.root
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.maxsize < 1 << 32, reason="compares with 64-bit glibc")
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=6))
@example(lines=["nameserver 192.0.2.1 # long\n", "#" * 100_000 + "\n", "nameserver 192.0.2.2"])
@example(lines=[f"nameserver 192.0.2.{number}\n" for number in (1, 1, 2, 3, 4)])
@example(lines=[f"nameserver 192.0.2.{number}\n" for number in range(1, 6)])
@example(lines=["nameserver fe80::1%lo\n", "nameserver fe80::1%99\n", "nameserver fe80::1%nope\n"])
def test_the_c_library_reads_it_the_same_way(library: Library, lines: list[str]) -> None:
    content = "".join(lines).encode()
    ours = parse(text.decoded(content)).servers
    assert list(dict.fromkeys(map(_numbered, ours))) == library.servers(content)


@given(st.text(max_size=60).map(lambda rest: f"nameserver {rest}"))
def test_junk_is_read(content: str) -> None:
    assert parse(content).servers

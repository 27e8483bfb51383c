"""The name servers that the C library asks: resolv.conf(5), as glibc reads it (resolv/res_init.c).

Numbers are left to the C library itself: inet_aton(3) reads 127.1 as 127.0.0.1, and 010.0.0.1 as 8.0.0.1. musl reads
the file in the same way (src/network/resolvconf.c), except that it takes what stands before a carriage return.
"""

from __future__ import annotations

import socket
import stat
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from tpctl.spec.policy import Address, NameServer
from tpctl.system import text
from tpctl.system.errors import HostError
from tpctl.system.input_files import UnusableFileError, read_bytes

MAX_RESOLV_CONF = 1024 * 1024
"""Bytes."""
MAX_SERVERS = 3
"""MAXNS in resolv.h: glibc and musl ask no more than the first three, repetitions included."""
DEFAULT = NameServer(IPv4Address("127.0.0.1"))
"""Who is asked where no server is named, or there is no file."""

_KEYWORD = "nameserver"
_BLANKS = (" ", "\t")


class Resolv(NamedTuple):
    """What a resolv.conf comes to."""

    servers: tuple[NameServer, ...]
    """Those that are asked, in order and without repetitions; never empty."""
    is_default: bool = False
    """Whether the file names none."""
    remarks: tuple[str, ...] = ()
    """Lines that are read otherwise than they look, or not at all; each begins with its number."""


class _Line(NamedTuple):
    server: NameServer | None = None
    remark: str | None = None


def parse(content: str) -> Resolv:
    """What the C library makes of a resolv.conf.

    An IPv4 address written as IPv6 (::ffff:10.0.0.1) becomes plain, and an unspecified one this host's own, because so
    do the packets to it.

    >>> found = parse("nameserver 127.1\\nnameserver fe80::1%eth0 # router\\n nameserver 192.0.2.1")
    >>> [str(server) for server in found.servers]
    ['127.0.0.1', 'fe80::1%eth0']
    >>> found.remarks[-1]
    'line 3: " nameserver 192.0.2.1" is skipped, because the keyword does not begin the line'
    """
    servers: list[NameServer] = []
    remarks = []
    for number, line in enumerate(text.lines(content), 1):
        found = _read(line.partition("\0")[0], is_wanted=len(servers) < MAX_SERVERS)
        servers += [found.server] if found.server else []
        remarks += [f"line {number}: {found.remark}"] if found.remark else []
    return Resolv(tuple(dict.fromkeys(servers)) or (DEFAULT,), not servers, tuple(remarks))


def keyword_and_rest(line: str) -> tuple[str, str]:
    """The keyword of a line, which has to begin it, and what is behind the blanks; empty for what the C library skips.

    >>> keyword_and_rest("options\\trotate timeout:1"), keyword_and_rest(" options rotate"), keyword_and_rest("options")
    (('options', 'rotate timeout:1'), ('', 'options rotate'), ('', 'options'))
    """
    line = line.partition("\0")[0]
    end = min((at for blank in _BLANKS if (at := line.find(blank)) >= 0), default=0)
    return line[:end], line[end:].lstrip(" \t")


def _read(line: str, *, is_wanted: bool) -> _Line:
    keyword, rest = keyword_and_rest(line)
    if keyword != _KEYWORD:
        return _Line(remark=_if_meant(line))
    word = (text.words(rest) or [""])[0]
    server = _name_server(word)
    quoted = f'"{text.on_one_line(line)}"'
    if server is None:
        return _Line(remark=f"{quoted} is skipped, because {_why_not(word)}")
    if not is_wanted:
        return _Line(remark=f"{quoted} is skipped, because no more than {MAX_SERVERS} servers are asked")
    if ":" not in word and word != str(server.address):
        return _Line(server, f"{quoted} means {server}")
    return _Line(server)


def _if_meant(line: str) -> str | None:
    """Why a line that looks as if it named a server does not."""
    first = (line.split() or [""])[0].lower()
    if not first.startswith(_KEYWORD):
        return None
    why = f'the keyword is "{_KEYWORD}", with a space after it'
    if first == _KEYWORD and line[:1].isspace():
        why = "the keyword does not begin the line"
    return f'"{text.on_one_line(line)}" is skipped, because {why}'


def _why_not(word: str) -> str:
    if not word:
        return "there is no address"
    if word.endswith("\r"):
        return "there is a carriage return after the address"
    return f"{text.on_one_line(word)} is not an address"


def _name_server(word: str) -> NameServer | None:
    """The server of the word behind the keyword, which may hold any sign but blanks and zero bytes."""
    try:
        if not word.isascii():
            return None
        if word[:1].isdigit() and not any(sign.isspace() for sign in word):
            try:
                return NameServer(_reached(IPv4Address(socket.inet_aton(word))))
            except OSError:
                pass  # it may be one of IPv6
        plain, _, scope = word.partition("%")
        address = IPv6Address(socket.inet_pton(socket.AF_INET6, plain))
    except (OSError, ValueError):
        return None
    # Only a link-local address needs its scope; on others the C library ignores it, and a rule must not be narrower.
    return NameServer(_reached(address), scope if scope and address.is_link_local else None)


def _reached(address: Address) -> Address:
    """Where packets to an address go: to an unspecified one, to this host (ip(7))."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_unspecified:
        return IPv4Address("127.0.0.1") if address.version == 4 else IPv6Address("::1")
    return address


def load(path: str) -> Resolv:
    """What a file comes to. One that does not exist is as good as an empty one: the C library asks 127.0.0.1.

    Raises HostError when it cannot be read.
    """
    try:
        found = parse(text.decoded(read_bytes(path, MAX_RESOLV_CONF)))
        is_for_all = bool(Path(path).stat().st_mode & stat.S_IROTH)
    except (FileNotFoundError, NotADirectoryError):
        return parse("")._replace(remarks=("there is no such file",))
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnusableFileError as error:
        raise HostError(f"{path} {error}") from None
    if is_for_all:
        return found
    return found._replace(remarks=(*found.remarks, f"not every user may read it; programs of the others ask {DEFAULT}"))

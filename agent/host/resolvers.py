"""The name servers of resolv.conf(5)."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

from agent.errors import HostError
from agent.input_files import UnusableFileError, read_bytes
from agent.policy import NameServer

MAX_RESOLV_CONF = 1024 * 1024
"""Bytes."""


def parse_name_servers(text: str) -> tuple[NameServer, ...]:
    """The name servers of a resolv.conf, in order and without repetitions.

    Everything else is skipped, as the C library does: other keywords, comments, lines that make no sense. An IPv4
    address written as IPv6 (::ffff:10.0.0.1) becomes plain, because the packets to it are IPv4.

    >>> [str(server) for server in parse_name_servers("nameserver 10.0.0.53\\nnameserver fe80::1%eth0 # router")]
    ['10.0.0.53', 'fe80::1%eth0']
    """
    servers: dict[NameServer, None] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            server = _name_server(words[1])
            if server is not None:
                servers[server] = None
    return tuple(servers)


def _name_server(text: str) -> NameServer | None:
    plain, _, scope = text.partition("%")
    try:
        address = ip_address(plain)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return NameServer(address.ipv4_mapped)
    # Only a link-local address needs its scope; on others the C library ignores it, and a rule must not be narrower.
    return NameServer(address, scope if scope and address.is_link_local else None)


def read_resolv_conf(path: str) -> str:
    """The text of a resolv.conf. Raises HostError when it cannot be read."""
    try:
        return read_bytes(path, MAX_RESOLV_CONF).decode(errors="replace")
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnusableFileError as error:
        raise HostError(f"{path} {error}") from None

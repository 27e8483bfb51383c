"""The relay's parsers under random input: each must read it or refuse it with its own error, and keep nothing of it."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fuzz.mutate import mutations
from tests.unit.envoy.examples import EVERYTHING
from tests.unit.relay.settings.examples import FULL
from tpctl.config.values import BadValueError
from tpctl.config.yaml_text import parse_yaml
from tpctl.envoy.documents import Places
from tpctl.envoy.render import render
from tpctl.envoy.settings import settings_of as envoy_settings_of
from tpctl.relay.connections.proxy_protocol import (
    SIGNATURE,
    Header,
    HeaderReader,
    MalformedHeaderError,
    Tlv,
    build,
    parse,
)
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.file import settings_of
from tpctl.relay.settings.listen import read_listen
from tpctl.system.errors import InputError
from tpctl.system.input_files import UnusableFileError

ENVOY = EVERYTHING.replace("jwks_file: {there}/jwks.json", "jwks_uri: https://keys.test/")
"""Without a file that is read."""
MAX_GROWTH = 32 * 1024 * 1024
"""Bytes by which the process may grow during a run."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parser, and inputs it knows."""

    name: str
    feed: Callable[[bytes], None]
    corpus: Sequence[bytes]


def feed_proxy_protocol(data: bytes) -> None:
    """What a header is read as says the same when it is written and read again; nothing after it is taken."""
    reader = HeaderReader()
    try:
        taken = reader.take(data)
    except MalformedHeaderError:
        return
    assert 0 <= taken <= len(data)
    if reader.header is not None:
        header = reader.header
        if header.destination is not None or header.version == 2:
            again = parse(build(header))
            assert (again.source, again.destination, again.local) == (header.source, header.destination, header.local)
            assert [tlv.kind for tlv in again.tlvs] == [tlv.kind for tlv in header.tlvs]
    else:
        with contextlib.suppress(MalformedHeaderError):
            assert 0 <= reader.take(b"\r\n") <= 2


def feed_listen(data: bytes) -> None:
    """A listener, or what is wrong with it."""
    with contextlib.suppress(BadValueError):
        read_listen(data.decode("utf-8", "replace"))


def feed_config(data: bytes) -> None:
    """A file, or what is wrong with it."""
    with contextlib.suppress(InputError, UnusableFileError):
        settings_of(parse_yaml(data.decode("utf-8", "replace")), "r.yaml")


def feed_envoy(data: bytes) -> None:
    """The same for Envoy: what is read can be rendered."""
    with contextlib.suppress(InputError, UnusableFileError):
        found = envoy_settings_of(parse_yaml(data.decode("utf-8", "replace")), "e.yaml")
        assert render(found, Places()).files()


ENDS = (Destination("192.0.2.1", 4), Destination("2001:db8::1", 65535, 10))
HEADERS = [
    build(Header(version, local, source, destination, tlvs))
    for version in (1, 2)
    for local in (False, True)
    for source in (*ENDS, None)
    for destination in ENDS
    for tlvs in ((), (Tlv(2, b"name"), Tlv(3, b"0000")), (Tlv(3, b"0000"), Tlv(32, bytes(40))))
]
LISTENS = [
    b"*:15006 proxy_protocol ssl", b"[::]:15001 ipv6only=off backlog=4096 reuseport", b"unix:/run/r.sock",
    b"127.0.0.1:1 so_keepalive=30m::10 deferred transparent bind", b"[fe80::1]:65535 so_keepalive=on",
]  # fmt: skip
TARGETS = (
    Target("PROXY protocol", feed_proxy_protocol, [*HEADERS, SIGNATURE, b"PROXY ", b"PROXY UNKNOWN\r\n"]),
    Target("listen", feed_listen, LISTENS),
    Target("Envoy's configuration", feed_envoy, [ENVOY.format(there="/nonexistent").encode()]),
    Target("configuration", feed_config, [FULL.encode(), b"listeners: [{listen: '*:1', direction: dns}]"]),
)


def run(target: Target, count: int, seed: int) -> str:
    """Feed `count` inputs; a line about it. Raises whatever the parser raises, with the input that made it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    for data in mutations(target.corpus, count, seed):
        try:
            target.feed(data)
        except Exception as error:
            raise AssertionError(f"{target.name}, seed {seed}: {data!r}") from error
    seconds = time.monotonic() - begin
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < MAX_GROWTH, f"{target.name}: the process has grown by {growth} bytes"
    return f"{target.name:16} {count:9} inputs, no crash, {growth // 1024} KiB more memory, {seconds:.0f} s"

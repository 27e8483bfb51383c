"""Envoy's admin interface, over its unix socket."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tpctl.envoy.documents import CLUSTERS, LISTENERS

_SECONDS = 2.0
_MAX_ANSWER = 16 * 1024 * 1024
_SUBSCRIPTIONS = {CLUSTERS: "cluster_manager.cds", LISTENERS: "listener_manager.lds"}
_FILTER = (
    r"^(cluster_manager.cds|listener_manager.lds|sds\..*)\.(version_text|update_rejected|update_failure)$"
    r"|^listener_manager\.total_listeners_warming$|^(listener|http)\..*\.downstream_(cx|rq)_active$"
)


_IS_NOT_COUNTED = re.compile(r"^(?:listener|http)\.admin$|\.(?:worker_\d+|main_thread)$")
"""Of names: the admin interface, and what is counted for the whole listener too."""


class AdminError(Exception):
    """Envoy does not answer, or not as it should."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__("tpctl", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True, slots=True)
class Figures:
    """What Envoy says of its subscriptions, by the name of the file of each."""

    versions: Mapping[str, str]
    """Of what it has taken last."""
    refused: Mapping[str, int]
    """How many times it has refused one, or found one that it cannot read."""
    warming: int = 0
    """Listeners that wait for something before they serve."""
    busy: int = 0
    """Clients' connections, of HTTP only those with a request: the others may be closed at any time (RFC 9112, 9.3)."""


class Certificate(NamedTuple):
    """One that Envoy has loaded."""

    serial: int
    names: tuple[str, ...]
    days: int
    """Until it expires; Envoy says 0 of one that has expired."""
    expires: str
    """As in 2026-12-11T03:54:07Z."""


class Admin:
    """Asks one Envoy. Everything raises AdminError."""

    def __init__(self, path: Path, seconds: float = _SECONDS) -> None:
        self._path = path
        self._seconds = seconds

    def is_live(self) -> bool:
        """Whether it serves, and does not drain."""
        return self._ask("GET", "/ready")[0] == http.client.OK

    def figures(self) -> Figures:
        """How its subscriptions stand."""
        return figures_of(self._told("/stats?filter=" + _quoted(_FILTER)))

    def certificates(self) -> list[Certificate]:
        """Those that it has loaded, each of a chain, and authorities."""
        try:
            found = json.loads(self._told("/certs"))["certificates"]
            return [
                Certificate(
                    int(one.get("serial_number") or "0", 16),
                    tuple(str(name) for names in one.get("subject_alt_names", ()) for name in names.values()),
                    int(one.get("days_until_expiration", 0)),
                    str(one.get("expiration_time", "")),
                )
                for group in found
                for one in (*group.get("ca_cert", ()), *group.get("cert_chain", ()))
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdminError(f"/certs is not what is expected: {error}") from error

    def stop_accepting(self) -> None:
        """Accept no connection any more, and have those that speak HTTP end with the next answer."""
        for what in ("/healthcheck/fail", "/drain_listeners"):
            self._told(what, "POST")

    def _told(self, what: str, method: str = "GET") -> str:
        status, text = self._ask(method, what)
        if status != http.client.OK:
            raise AdminError(f"{what}: {status} {text[:200]}")
        return text

    def _ask(self, method: str, what: str) -> tuple[int, str]:
        connection = _Connection(self._path, self._seconds)
        try:
            connection.request(method, what)
            answer = connection.getresponse()
            return answer.status, answer.read(_MAX_ANSWER).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise AdminError(f"the admin interface at {self._path} does not answer: {error}") from error
        finally:
            connection.close()


def figures_of(text: str) -> Figures:
    """The figures of a text of /stats.

    >>> figures_of('listener_manager.lds.version_text: "8e3b"\\nlistener_manager.lds.update_rejected: 2\\n').versions
    {'lds/lds.json': '8e3b'}
    """
    versions: dict[str, str] = {}
    refused: dict[str, int] = {}
    warming = busy = 0
    for line in text.splitlines():
        name, _, value = line.partition(": ")
        subscription, _, what = name.rpartition(".")
        if what == "version_text":
            versions[_file_of(subscription)] = value.strip('"')
        elif what in ("update_rejected", "update_failure"):
            file = _file_of(subscription)
            refused[file] = refused.get(file, 0) + int(value)
        elif what == "total_listeners_warming":
            warming = int(value)
        elif what in ("downstream_cx_active", "downstream_rq_active") and not _IS_NOT_COUNTED.search(subscription):
            is_idle = what == "downstream_cx_active" and subscription.startswith("http.")
            busy += -int(value) if is_idle else int(value)
    return Figures(versions, refused, warming, max(busy, 0))


def _file_of(subscription: str) -> str:
    for file, name in _SUBSCRIPTIONS.items():
        if name == subscription:
            return file
    return f"sds/{subscription.removeprefix('sds.')}/sds.json"


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text)

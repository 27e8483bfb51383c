"""Reads a relay's metrics over HTTP, at the address of its configuration."""

from __future__ import annotations

import socket
from http.client import HTTPConnection, HTTPException
from pathlib import PurePosixPath

from tpctl.relay.figures.reckoning import Figures, NotARelayError
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.listen import Address, show

_TIMEOUT = 5.0
_MAX_ANSWER = 16 * 1024 * 1024
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class NoAnswerError(Exception):
    """Nobody tells the figures."""


def read(address: Address) -> Figures:
    """The relay's figures. Raises NoAnswerError."""
    connection = _Connection(address)
    try:
        connection.request("GET", "/metrics?clients")
        answer = connection.getresponse()
        body = answer.read(_MAX_ANSWER).decode("utf-8", "replace")
        if answer.status != 200:
            raise NoAnswerError(f"what listens at {show(address)} serves no metrics: HTTP status {answer.status}")
        return Figures(body)
    except TimeoutError:
        raise NoAnswerError(f"no answer from {show(address)} within {_TIMEOUT:.0f} s") from None
    except OSError as error:
        raise NoAnswerError(f"no relay serves metrics at {show(address)}: {error.strerror or error}") from None
    except HTTPException:
        raise NoAnswerError(f"what listens at {show(address)} does not speak HTTP") from None
    except NotARelayError as error:
        raise NoAnswerError(f"{show(address)}: {error}") from None
    finally:
        connection.close()


class _Connection(HTTPConnection):
    """To an address and port or a unix socket, past every proxy."""

    def __init__(self, address: Address) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._address = address

    def connect(self) -> None:
        """Connect; called by request()."""
        address = self._address
        if isinstance(address, PurePosixPath):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(_TIMEOUT)
            self.sock.connect(str(address))
        else:
            self.sock = socket.create_connection(_reachable(address), timeout=_TIMEOUT)


def _reachable(address: Destination) -> tuple[str, int]:
    return _EVERYWHERE.get(address.host, address.host), address.port

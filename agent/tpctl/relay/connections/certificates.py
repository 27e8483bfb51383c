"""Until when a certificate is good, and whom it is for."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOON_DAYS = 14
_DAY = 24 * 3600


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a certificate, as the end of a sentence; empty for nothing."""

    text: str = ""
    is_fatal: bool = False


def judge(path: Path, *, serves: bool, now: float | None = None) -> Verdict:
    """Look at the first certificate of a PEM file that OpenSSL could load. `serves`: it is shown to clients."""
    found = decoded(path)
    if found is None:
        return Verdict()
    now = time.time() if now is None else now
    begin, end = (ssl.cert_time_to_seconds(found[key]) for key in ("notBefore", "notAfter"))
    if now >= end:
        return Verdict(f"has expired on {found['notAfter']}", is_fatal=True)
    if now < begin:
        return Verdict(f"is not valid before {found['notBefore']}; is the clock right?", is_fatal=True)
    if serves and not found.get("subjectAltName"):
        text = "names nobody: it has no subject alternative name, without which no client accepts it (RFC 9525, 2)"
        return Verdict(text, is_fatal=True)
    if end - now < SOON_DAYS * _DAY:
        return Verdict(f"expires on {found['notAfter']}")
    return Verdict()


def decoded(path: Path) -> dict[str, Any] | None:
    """The first certificate of a PEM file, as SSLSocket.getpeercert() shows one; None where Python cannot."""
    # The standard library shows certificates of a connection only; its own tests read files by this function.
    internal: Any = getattr(ssl, "_ssl", None)
    decode = getattr(internal, "_test_decode_cert", None)
    if decode is None:
        return None
    try:
        found: dict[str, Any] = decode(str(path))
    except (ssl.SSLError, OSError):
        return None
    return found

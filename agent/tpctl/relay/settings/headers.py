"""Names of HTTP headers in the settings, and which of them may be given a value. Pure."""

from __future__ import annotations

import re

from tpctl.config.values import BadValueError, quoted

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")
"""RFC 9110, 5.6.2."""
_FRAMING = frozenset({
    "host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "keep-alive", "expect",
    "proxy-connection",
})  # fmt: skip
"""They say how a message is sent, and to whom."""
_OWN = frozenset({
    "x-forwarded-for", "x-forwarded-proto", "x-forwarded-client-cert", "x-request-id", "x-real-ip", "forwarded", "via",
})  # fmt: skip
"""The data plane sets or removes them itself."""


def header_name(value: object) -> str:
    """The name of a header. Raises BadValueError.

    Without underscores, since a client's headers with one are not passed on: servers read X_Name as X-Name (as nginx's
    underscores_in_headers explains).
    """
    text = value.strip() if isinstance(value, str) else ""
    if not _TOKEN.fullmatch(text):
        raise BadValueError(f"{quoted(value)} is not the name of a header, such as X-Origin-Verify")
    if "_" in text:
        raise BadValueError(f"{quoted(value)}: headers with an underscore are not passed on; write a dash")
    return text


def own_header(value: object) -> str:
    """The name of a header that a user may choose: none that the data plane sets. Raises BadValueError."""
    name = header_name(value)
    low = name.lower()
    if low in _FRAMING:
        raise BadValueError(f"{quoted(value)} says how a message is sent; choose another header")
    if low in _OWN or low.startswith("x-envoy-"):
        raise BadValueError(f"{quoted(value)} is set by the data plane itself; choose another header")
    return name


def real_ip_header(value: object) -> str:
    """As `own_header`, and X-Real-IP, which it is for."""
    name = header_name(value)
    return name if name.lower() == "x-real-ip" else own_header(name)


def claim_header(value: object) -> str:
    """The header for a claim of a token: as `own_header`, but none that servers take for a proof themselves."""
    name = own_header(value)
    if name.lower() in ("authorization", "cookie", "proxy-authorization"):
        raise BadValueError(f"{quoted(value)} is how clients prove who they are; choose another header")
    return name

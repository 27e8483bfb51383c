"""What can be asked for as a host in TLS: a name of DNS, or an address."""

from __future__ import annotations

import re
from ipaddress import ip_address

_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*", re.I
)
"""Without a dot at the end (RFC 6066, 3); names in other scripts are written as xn--... (RFC 5890)."""


def is_host(text: str) -> bool:
    """Whether a text is a name or an address. A wildcard is neither: it stands in certificates only."""
    try:
        ip_address(text)
    except ValueError:
        return text.isascii() and _NAME.fullmatch(text) is not None
    return True

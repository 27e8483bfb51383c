"""Files of public keys (JWKS, RFC 7517)."""

from __future__ import annotations

import json

from tpctl.config.values import BadValueError, shown
from tpctl.system.input_files import UnusableFileError, read_text

MAX_BYTES = 256 * 1024
_PUBLIC = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
"""By the type of a key, what it is made of (RFC 7518, 6; RFC 8037, 2)."""


def read_jwks(path: object) -> str:
    """The keys of a file, as JSON of one form whatever its layout. Raises BadValueError with every problem."""
    path = str(path)
    try:
        tree = json.loads(read_text(path, MAX_BYTES))
    except UnusableFileError as error:
        raise BadValueError(f"{path} {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadValueError(f"{path} is not JSON: {shown(str(error))}") from None
    keys = tree.get("keys") if isinstance(tree, dict) else None
    if not isinstance(keys, list) or not keys:
        raise BadValueError(f'{path} is not a JWKS: it needs a list "keys" with at least one key (RFC 7517)')
    problems = [f"{path}: keys[{index}] {problem}" for index, key in enumerate(keys) if (problem := _problem(key))]
    if problems:
        raise BadValueError(problems)
    return json.dumps({"keys": keys}, sort_keys=True)


def _problem(key: object) -> str | None:
    kind = key.get("kty") if isinstance(key, dict) else None
    if not isinstance(key, dict) or not isinstance(kind, str):
        return 'is not a key: it has no "kty" (RFC 7517)'
    if kind == "oct":
        return "is a shared secret (oct); only public keys (RSA, EC, OKP) can be kept in such a file"
    if kind not in _PUBLIC:
        return f'has "kty" {shown(kind)}, which is none of {", ".join(_PUBLIC)}'
    if "d" in key:
        return 'is a private key: remove "d" and all that belongs to it, and replace the key if others could read it'
    missing = [part for part in _PUBLIC[kind] if not isinstance(key.get(part), str)]
    return f"lacks {', '.join(missing)}" if missing else None

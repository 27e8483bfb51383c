"""Whether what is printed as JSON is what docs/schemas/output.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FOLDER = Path(__file__).resolve().parents[1] / "docs/schemas"


@cache
def schema(name: str) -> Mapping[str, Any]:
    """A schema of docs/schemas, itself checked."""
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(found)
    return found


@cache
def _validator(kind: str) -> Draft202012Validator:
    whole = schema("output.json")
    return Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": whole["$defs"]})


def validated(text: str) -> dict[str, Any]:
    """The document that a command printed; AssertionError when it is not what the schema says."""
    document: dict[str, Any] = json.loads(text)
    assert document["kind"] in {one["$ref"].rpartition("/")[2] for one in schema("output.json")["oneOf"]}
    problems = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:500]}"
        for error in _validator(document["kind"]).iter_errors(document)
    ]
    assert not problems, "\n".join(problems)
    return document

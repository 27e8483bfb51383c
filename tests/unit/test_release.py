"""What a release is made of: pinned dependencies, the list of parts, static checks without unexplained exceptions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / ".ci/requirements.txt").read_text(encoding="utf-8")
PIN = re.compile(r"([a-z0-9-]+)==([0-9][^ ]*)((?: --hash=sha256:[0-9a-f]{64})+)")
EXCEPTION = re.compile(r"# (?:noqa: (?:[A-Z]+\d+, )*S\d+|nosec)(.*)$")


def pins() -> dict[str, str]:
    lines = LOCK.replace(" \\\n   ", "").splitlines()[1:]
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), [line for line, one in zip(lines, found, strict=True) if not one]
    return {one[1]: one[2] for one in found if one}


@pytest.mark.parametrize("line", [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]])
def test_every_dependency_is_pinned_with_hashes(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_the_lock_names_no_host() -> None:
    assert "://" not in LOCK
    assert "--index" not in LOCK


def test_the_check_finds_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    for name in ("pyproject.toml", ".ci/lock.py", ".ci/requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    argv = [sys.executable, str(tmp_path / ".ci/lock.py"), "--check"]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    (tmp_path / ".ci/requirements.txt").write_text(LOCK.replace("click==", "clack=="))
    project = (tmp_path / "pyproject.toml").read_text().replace('"PyYAML>=6.0"', '"PyYAML>=99"')
    (tmp_path / "pyproject.toml").write_text(project)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "click>=8.1 is not pinned: missing" in done.stderr
    assert "PyYAML>=99 is not pinned: 6" in done.stderr


@pytest.fixture(scope="module")
def bom(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("dist") / "tpctl.cdx.json"
    argv = [sys.executable, str(ROOT / ".ci/sbom.py"), str(place)]
    texts = set()
    for _ in range(2):
        subprocess.run(argv, check=True, capture_output=True, env={"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": "1"})
        texts.add(place.read_text())
    (text,) = texts
    found: dict[str, Any] = json.loads(text)
    return found


def test_the_list_of_parts_has_the_shape_of_cyclonedx(bom: dict[str, Any]) -> None:
    assert (bom["bomFormat"], bom["specVersion"], bom["version"]) == ("CycloneDX", "1.5", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bom["serialNumber"])
    assert bom["metadata"]["timestamp"] == "1970-01-01T00:00:01Z"
    own = bom["metadata"]["component"]
    assert (own["type"], own["name"]) == ("application", "tpctl")
    for component in bom["components"]:
        assert {"type", "name", "version", "purl", "bom-ref"} <= component.keys()
        assert re.fullmatch(r"pkg:(pypi|deb/\w+)/[a-z0-9.+-]+@[^@ ]+", component["purl"]), component
    refs = [own["bom-ref"], *(component["bom-ref"] for component in bom["components"])]
    assert len(set(refs)) == len(refs)
    mentioned = {ref for node in bom["dependencies"] for ref in (node["ref"], *node["dependsOn"])}
    assert mentioned <= set(refs)


def test_the_list_of_parts_has_every_dependency(bom: dict[str, Any]) -> None:
    names = {component["name"] for component in bom["components"]}
    assert {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]} <= names


def test_the_security_rules_are_on_and_every_exception_says_why() -> None:
    assert "S" in PROJECT["tool"]["ruff"]["lint"]["select"]
    assert {rule for rule in PROJECT["tool"]["ruff"]["lint"]["ignore"] if rule.startswith("S")} == {"S101", "S104"}
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (ROOT / "agent").rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := EXCEPTION.search(line)) and not re.match(r" - \w.{5}", found[1])
    ]
    assert lines == []

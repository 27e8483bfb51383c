"""Writes dist/tpctl.cdx.json: what an installed tpctl is made of, as CycloneDX 1.5.

The Python packages are those of this environment that tpctl depends on; the distribution's are those it calls or loads,
as far as dpkg knows them here. SOURCE_DATE_EPOCH makes the file the same each time.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "dist/tpctl.cdx.json"
NAME = "tpctl"
DISTRIBUTION_PACKAGES = ("python3", "nftables", "python3-nftables", "libnftables1", "iptables", "libxtables12",
                         "libip4tc2", "libip6tc2", "python3-bpfcc", "libbpfcc")  # fmt: skip
NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")
"""RFC 4122, appendix C: names that are URLs."""


def requirements(name: str) -> list[str]:
    """The packages that a Python package needs here, by canonical name."""
    lines = (Requirement(line) for line in metadata.requires(name) or ())
    needed = (one for one in lines if one.marker is None or one.marker.evaluate({"extra": ""}))
    return sorted({canonicalize_name(one.name) for one in needed})


def python_packages() -> dict[str, list[str]]:
    """tpctl and everything below it, each with what it needs."""
    found: dict[str, list[str]] = {}
    left = [NAME]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = requirements(name)
            left += found[name]
    return found


def python_component(name: str) -> dict[str, Any]:
    """A package of PyPI."""
    about = metadata.metadata(name)
    version = metadata.version(name)
    purl = f"pkg:pypi/{name}@{quote(version)}"
    license_name = about.get("License-Expression") or about.get("License") or ""
    component = {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
    if license_name and "\n" not in license_name:
        component["licenses"] = [{"license": {"name": license_name}}]  # type: ignore[assignment]
    return component


def distribution_components() -> list[dict[str, Any]]:
    """The packages of Debian or Ubuntu that are installed."""
    form = "${db:Status-Status} ${Package} ${Version} ${Architecture}\n"
    try:
        command = ["dpkg-query", "--show", f"--showformat={form}", *DISTRIBUTION_PACKAGES]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        system = next(line for line in Path("/etc/os-release").read_text().splitlines() if line.startswith("ID="))
    except (OSError, StopIteration):
        return []
    vendor = system.removeprefix("ID=").strip('"')
    found = []
    for status, name, version, machine in (line.split() for line in said.splitlines()):
        if status == "installed":
            purl = f"pkg:deb/{vendor}/{name}@{quote(version)}?arch={machine}"
            found.append({"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl})
    return found


def document() -> dict[str, Any]:
    """The whole of it."""
    packages = python_packages()
    components = {name: python_component(name) for name in packages}
    own = {**components.pop(NAME), "type": "application"}
    others = distribution_components()
    refs = {name: f"pkg:pypi/{name}@{quote(metadata.version(name))}" for name in packages}
    graph = [{"ref": refs[name], "dependsOn": [refs[one] for one in needed]} for name, needed in packages.items()]
    graph[0]["dependsOn"] += [one["bom-ref"] for one in others]  # type: ignore[operator]
    when = datetime.datetime.fromtimestamp(
        int(os.environ.get("SOURCE_DATE_EPOCH") or datetime.datetime.now(datetime.UTC).timestamp()), datetime.UTC
    )
    body = [*components.values(), *others]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, json.dumps([own, body], sort_keys=True))}",
        "version": 1,
        "metadata": {"timestamp": when.strftime("%Y-%m-%dT%H:%M:%SZ"), "component": own},
        "components": sorted(body, key=lambda one: str(one["purl"])),
        "dependencies": sorted(graph, key=lambda one: str(one["ref"])),
    }


def main() -> None:
    """The command: the place may be given."""
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else PLACE
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(document(), indent=2) + "\n", encoding="utf-8")
    print(place)


if __name__ == "__main__":
    main()

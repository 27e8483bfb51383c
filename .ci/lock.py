"""Writes .ci/requirements.txt: every package that an installed tpctl needs, by version and by SHA-256 of its files.

    .venv/bin/python .ci/lock.py            write it anew, from the index that pip uses here
    .venv/bin/python .ci/lock.py --check    whether it has what pyproject.toml asks for

A release is installed from it with `pip install --require-hashes --no-build-isolation -r .ci/requirements.txt`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / ".ci/requirements.txt"
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("manylinux2014_x86_64", "manylinux2014_aarch64")
"""Of packages with compiled parts the wheels of these are listed."""
HEADER = "# Written by `make lock`. `make lock-check` compares it with pyproject.toml.\n"


def wanted() -> list[Requirement]:
    """What tpctl needs to be built and to run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    return [Requirement(line) for line in lines]


def locked() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Version and hashes by name."""
    found = {}
    for line in FILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            pin, *hashes = line.split()
            name, _, version = pin.partition("==")
            found[canonicalize_name(name)] = (version, tuple(one.removeprefix("--hash=sha256:") for one in hashes))
    return found


def problems() -> Iterator[str]:
    """What pyproject.toml asks for and the file does not have."""
    pins = locked()
    for requirement in wanted():
        version, hashes = pins.get(canonicalize_name(requirement.name), ("", ()))
        if not version or not requirement.specifier.contains(version):
            yield f"{requirement} is not pinned: {version or 'missing'}"
        elif not hashes:
            yield f"{requirement} has no hash"


def download(*arguments: str) -> None:
    """Let pip fetch files."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def name_and_version(file: Path) -> tuple[str, str]:
    """From the name of a wheel or source distribution."""
    parsed = parse_wheel_filename(file.name)[:2] if file.suffix == ".whl" else parse_sdist_filename(file.name)
    return canonicalize_name(parsed[0]), str(parsed[1])


def write() -> None:
    """Write the file anew."""
    files: dict[tuple[str, str], set[str]] = defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        download("--dest", folder, *map(str, wanted()))
        for compiled in [path for path in Path(folder).glob("*.whl") if not path.stem.endswith("-any")]:
            pin = "==".join(name_and_version(compiled))
            for python in PYTHONS:
                for machine in MACHINES:
                    only = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", f"--platform={machine}"]
                    download("--dest", folder, *only, pin)
        for path in Path(folder).iterdir():
            files[name_and_version(path)].add(hashlib.sha256(path.read_bytes()).hexdigest())
    pins = [
        " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{each}" for each in sorted(hashes))])
        for (name, version), hashes in sorted(files.items())
    ]
    FILE.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")


def main() -> None:
    """The command."""
    if sys.argv[1:] != ["--check"]:
        write()
    if said := list(problems()):
        sys.exit("\n".join(said))


if __name__ == "__main__":
    main()

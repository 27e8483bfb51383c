"""What is in the packages, and that building them again makes the same bytes."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from delivery import CHECKOUT, deb, python, release, rpm
from tpctl import __version__
from tpctl.config import load

EXAMPLE = CHECKOUT / ".ci/delivery/config.yaml.example"


def contents(command: list[str]) -> set[str]:
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.fixture(autouse=True)
def _a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source distribution has no commit that tells it."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", os.environ.get("SOURCE_DATE_EPOCH", "1700000000"))


def copy(source: Path, destination: Path) -> None:
    """Copy a file or folder as it is, but for what running it has left there, and others are writing."""
    if source.is_dir():
        left = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source, destination, symlinks=True, ignore=left)
    else:
        shutil.copy2(source, destination)


def of_the_package(place: str) -> set[str]:
    """Every file of the package as it lies on a host."""
    package = CHECKOUT / "agent/tpctl"
    # Other tests write byte code meanwhile, which has other names until it is complete.
    paths = (one for one in package.rglob("*") if "__pycache__" not in one.parts and one.is_file())
    paths = (one for one in paths if one.suffix != ".md")
    programs = {f"{place}/tpctl/bpf/sources/{path.name}" for path in (CHECKOUT / "bpf").glob("*.c")}
    return programs | {f"{place}/tpctl/{path.relative_to(package)}" for path in paths}


EVERYWHERE = {
    "/usr/bin/tpctl",
    "/etc/tpctl/config.yaml.example",
    "/usr/share/bash-completion/completions/tpctl",
    "/usr/share/fish/vendor_completions.d/tpctl.fish",
    "/usr/share/man/man8/tpctl.8.gz",
    "/usr/share/man/man8/tpctl-install.8.gz",
    "/usr/share/doc/tpctl/operations.md",
    "/usr/share/doc/tpctl/schemas/config.json",
    "/usr/share/doc/tpctl/prometheus/alerts.yaml",
    "/usr/share/doc/tpctl/CHANGELOG.md.gz",
    *(
        f"/usr/lib/systemd/system/{name}"
        for name in ("tpctl.service", "tpctl-relay.service", "tpctl-relay.socket", "tpctl-resolv.path")
    ),
}


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb here")
def test_the_debian_package(tmp_path: Path) -> None:
    first, second = deb.build(tmp_path / "a"), deb.build(tmp_path / "b")
    assert filecmp.cmp(first, second, shallow=False)
    assert first.name == f"tpctl_{deb.VERSION}_all.deb"
    root = tmp_path / "root"
    subprocess.run(["dpkg-deb", "--raw-extract", str(first), str(root)], check=True)
    files = {f"/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file()}
    wanted = (
        EVERYWHERE | {"/usr/share/zsh/vendor-completions/_tpctl"} | of_the_package("/usr/lib/python3/dist-packages")
    )
    assert not wanted - files
    assert not [name for name in files if "__pycache__" in name]
    checked = subprocess.run(["md5sum", "--quiet", "--check", "DEBIAN/md5sums"], cwd=root, check=False)
    assert checked.returncode == 0
    for script in deb.SCRIPTS:
        text = (root / "DEBIAN" / script).read_text()
        assert "@" not in text
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.mark.skipif(not shutil.which("rpmbuild"), reason="no rpmbuild here")
def test_the_rpm_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What other projects' packages hold is fetched, and has hashes: `make rpm` is where that is seen.
    monkeypatch.setattr(rpm, "_environment", lambda root: None)
    first, second = rpm.build(tmp_path / "a"), rpm.build(tmp_path / "b")
    assert filecmp.cmp(first, second, shallow=False)
    query = ["rpm", "--query", "--package", str(first)]
    files = contents([*query, "--list"])
    wanted = EVERYWHERE | {"/usr/share/zsh/site-functions/_tpctl"} | of_the_package(f"/{rpm.LAYOUT.modules}")
    assert not wanted - files
    assert not {name for name in files if "__pycache__" in name}
    assert {"python3.11", "python3.11-pyyaml"} <= contents([*query, "--requires"])
    assert contents([*query, "--queryformat", "%{ARCH} %{BUILDHOST}"]) == {"noarch", "localhost"}
    assert "/etc/tpctl/config.yaml.example" in contents([*query, "--configfiles"])


def test_the_rpm_package_has_what_is_pinned_and_needed() -> None:
    inside = {line.partition("==")[0] for line in rpm.pinned().splitlines()}
    needed = {
        canonicalize_name(Requirement(line).name) for line in metadata.requires("tpctl") or () if "extra" not in line
    }
    assert inside == needed - set(rpm.OF_THE_DISTRIBUTION)
    assert all("--hash=sha256:" in line for line in rpm.pinned().splitlines())


def test_the_wheel_and_the_source_distribution(tmp_path: Path) -> None:
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "agent",
        "bpf",
        "systemd",
        ".ci",
    ):
        (tmp_path / "tree").mkdir(exist_ok=True)
        copy(CHECKOUT / name, tmp_path / "tree" / name)
    (tmp_path / "tree/tests").mkdir()
    (tmp_path / "tree/tests/test_one.py").write_text("")
    copy(tmp_path / "tree", tmp_path / "again")
    packed = python.sdist(tmp_path / "tree", tmp_path / "a")
    assert filecmp.cmp(packed, python.sdist(tmp_path / "again", tmp_path / "b"), shallow=False)
    with tarfile.open(packed) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_one.py", "Makefile", "bpf/inbound.c", ".ci/run", "systemd/tpctl.service"} <= names
    made = python.wheel(tmp_path / "again", tmp_path / "a")
    with zipfile.ZipFile(made) as archive:
        assert {name.removeprefix("/") for name in of_the_package("")} <= set(archive.namelist())
        about = archive.read(f"tpctl-{__version__}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0\n" in about


def test_a_release_has_a_section_of_the_changelog() -> None:
    text = "# Changelog\n\n## [1.1.0] - unreleased\n\n### Added\n\n- b\n\n## [1.0.0] - 2026-01-31\n\n- a\n"
    assert release.changes(text, "1.0.0") == ("2026-01-31", "- a\n")
    assert release.changes(text, "1.1.0") == ("unreleased", "### Added\n\n- b\n")
    with pytest.raises(release.NotReadyError, match="no section"):
        release.changes(text, "2.0.0")
    date, said = release.changes((CHECKOUT / "CHANGELOG.md").read_text(), __version__)
    assert date
    assert "\n### " in said, "it has parts"


def test_the_example_of_a_configuration_can_be_read() -> None:
    config = load.load(files=[str(EXAMPLE)])
    assert config.proxy_user == "kuma-dp"
    assert not config.notices

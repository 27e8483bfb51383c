"""`python -m delivery.rpm`: dist/tpctl-VERSION-1.noarch.rpm, for RHEL 9 and what is like it.

Its Python is 3.11 or later only beside the system's own, and most of what tpctl needs is not packaged for that one. So
the package has a virtual environment of its own in /usr/lib/tpctl, with the pure Python packages that
.ci/requirements.txt pins, and the distribution's PyYAML. Needs rpmbuild, and pip's way to its index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from delivery import CHECKOUT, DESCRIPTION, DIST, NAME, SUMMARY, epoch
from delivery.tree import EXAMPLE, Layout, everything, lay, settle, write
from tpctl import __version__

PYTHON = "3.11"
HOME = Path("usr/lib/tpctl")
LAYOUT = Layout(
    modules=HOME / f"lib/python{PYTHON}/site-packages",
    python=f"/{HOME}/bin/python",
    zsh=Path("usr/share/zsh/site-functions"),
)
RELEASE = "1"
VERSION = __version__.replace("rc", "~rc")
FOR_BUILDING = ("setuptools",)
OF_THE_DISTRIBUTION = ("pyyaml",)
"""It has a compiled part, so it would make the package one of an architecture."""
SPEC = Path(__file__).with_name("tpctl.spec")


def build(folder: Path = DIST) -> Path:
    """Build it. Raises subprocess.CalledProcessError, and RuntimeError when no commit tells the time."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        root, spec = Path(work, "root"), Path(work, SPEC.name)
        root.mkdir()
        lay(root, LAYOUT)
        _environment(root)
        settle(root)
        _spec(spec, root)
        macros = {
            "_topdir": f"{work}/top",
            "_rpmdir": work,
            "_build_name_fmt": "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
            "_buildhost": "localhost",
            "_binary_payload": "w9.xzdio",
            "__os_install_post": "%{nil}",
            "use_source_date_epoch_as_buildtime": "1",
            "clamp_mtime_to_source_date_epoch": "1",
            "tree": str(root),
        }
        words = ["rpmbuild", "--quiet", "-bb", str(spec)]
        words += [part for name, value in macros.items() for part in ("--define", f"{name} {value}")]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch())}
        subprocess.run(words, env=environment, check=True)
        built = next(Path(work).glob("*.rpm"))
        made = folder / built.name
        made.write_bytes(built.read_bytes())
    return made


def pinned() -> str:
    """The lines of .ci/requirements.txt for what the package has inside."""
    text = (CHECKOUT / ".ci/requirements.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    left_out = (*FOR_BUILDING, *OF_THE_DISTRIBUTION)
    return "".join(f"{line}\n" for line in text.splitlines() if "==" in line and not line.startswith(left_out))


def _environment(root: Path) -> None:
    """A virtual environment, as venv would make it on the host."""
    site = root / LAYOUT.modules
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write(pinned())
        wanted.flush()
        words = ["install", "--quiet", "--no-deps", "--no-compile", "--require-hashes", "--only-binary=:all:"]
        place = ["--platform=any", f"--python-version={PYTHON}", "--target", str(site), "--requirement", wanted.name]
        subprocess.run([sys.executable, "-m", "pip", *words, *place], check=True)
    for script in (site / "bin").glob("*"):  # other packages' commands
        script.unlink()
    (site / "bin").rmdir()
    for record in site.glob("*.dist-info/RECORD"):  # lists them
        record.unlink()
    write(root / HOME / "pyvenv.cfg", f"home = /usr/bin\ninclude-system-site-packages = true\nversion = {PYTHON}\n")
    program = root / HOME / "bin/python"
    program.parent.mkdir()
    program.symlink_to(f"/usr/bin/python{PYTHON}")


def _spec(path: Path, root: Path) -> None:
    """The spec file, with every file of the tree."""
    files = [f"/{one.relative_to(root)}" for one in everything(root) if one.is_symlink() or not one.is_dir()]
    own = [
        f"%dir /{one.relative_to(root)}"
        for one in everything(root)
        if one.is_dir() and NAME in str(one.relative_to(root))
    ]
    listed = [f"%config(noreplace) {name}" if name == f"/{EXAMPLE}" else name for name in files]
    values = {
        "@VERSION@": VERSION,
        "@RELEASE@": RELEASE,
        "@SUMMARY@": SUMMARY,
        "@PYTHON@": PYTHON,
        "@DESCRIPTION@": DESCRIPTION,
        "@FILES@": "\n".join([*own, *listed]),
    }
    text = SPEC.read_text(encoding="utf-8")
    for mark, value in values.items():
        text = text.replace(mark, value)
    write(path, text)


if __name__ == "__main__":
    print(build())

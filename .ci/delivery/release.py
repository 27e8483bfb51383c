"""`python -m delivery.release [--rehearse]`: everything of a release, from its tag, in dist/VERSION.

The wheel, the source distribution, the Debian and the RPM package, the list of components (SBOM), what the changelog
says, and SHA-256 sums of all of it. Publishing it is left to whoever runs this. --rehearse does without the tag and the
date in the changelog.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from delivery import CHECKOUT, DIST, NAME, deb, epoch, python, rpm
from tpctl import __version__

TAG = f"v{__version__}"
SUMS = "SHA256SUMS"
_SECTION = re.compile(r"^## \[([^\]]+)\] - ([^\n]+)\n(.*?)(?=^## \[|\Z)", re.MULTILINE | re.DOTALL)


class NotReadyError(Exception):
    """The checkout is not what a release is made from."""


def changes(changelog: str, version: str) -> tuple[str, str]:
    """The date of a version in the changelog, and what it says of it. Raises NotReadyError."""
    for name, date, text in _SECTION.findall(changelog):
        if name == version:
            return date.strip(), text.strip() + "\n"
    raise NotReadyError(f"CHANGELOG.md has no section [{version}]")


def ready(date: str) -> None:
    """Raise NotReadyError unless this is a clean checkout of the version's tag, and the changelog has its date."""
    if left := git("status", "--porcelain"):
        raise NotReadyError(f"there are changes that are not committed:\n{left}")
    if TAG not in git("tag", "--points-at", "HEAD").split():
        raise NotReadyError(f"this commit does not have the tag {TAG}; --rehearse does without")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise NotReadyError(f"CHANGELOG.md gives {__version__} the date {date!r}: write the day of the release there")


def git(*words: str) -> str:
    """What git says of the checkout."""
    command = ["git", "-C", str(CHECKOUT), *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def release(folder: Path, *, rehearse: bool) -> list[Path]:
    """Make all of it. Raises NotReadyError, and subprocess.CalledProcessError."""
    date, text = changes((CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__)
    if not rehearse:
        ready(date)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        python.export(Path(work, "wheel"))
        python.export(Path(work, "sdist"))
        made = [python.wheel(Path(work, "wheel"), folder), python.sdist(Path(work, "sdist"), folder)]
    made += [deb.build(folder), rpm.build(folder)]
    components = folder / f"{NAME}-{__version__}.cdx.json"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch())}
    words = [sys.executable, str(CHECKOUT / ".ci/sbom.py"), str(components)]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    notes = folder / f"{NAME}-{__version__}.changes.md"
    notes.write_text(text, encoding="utf-8")
    made += [components, notes]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(made)]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    return [*made, folder / SUMS]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="from any commit")
    arguments = parser.parse_args()
    try:
        print(*release(DIST / __version__, rehearse=arguments.rehearse), sep="\n")
    except NotReadyError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

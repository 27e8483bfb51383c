"""`python -m delivery.deb`: dist/tpctl_VERSION_all.deb, for Debian 12 and later and Ubuntu 24.04 and later."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import textwrap
import time
from email.utils import formatdate
from pathlib import Path

from delivery import DESCRIPTION, DIST, MAINTAINER, NAME, epoch
from delivery.tree import DOCS, EXAMPLE, Layout, everything, lay, settle, write, write_compressed
from tpctl import __version__
from tpctl.persist import neighbours, systemd, watch

LAYOUT = Layout(
    modules=Path("usr/lib/python3/dist-packages"),
    python="/usr/bin/python3",
    zsh=Path("usr/share/zsh/vendor-completions"),
)
SOURCES = Path(__file__).with_name("debian")
SCRIPTS = ("postinst", "prerm", "postrm")
VERSION = __version__.replace("rc", "~rc")
"""As dpkg compares: a release candidate comes before its release; deb-version(7)."""
UNITS = (systemd.SERVICE, *watch.UNITS, neighbours.SERVICE, systemd.RELAY, systemd.RELAY_SOCKET, systemd.DROP_IN)
"""What `tpctl persist` may have written."""


def build(folder: Path = DIST) -> Path:
    """Build it. Raises subprocess.CalledProcessError, and RuntimeError when no commit tells the time."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{NAME}_{VERSION}_all.deb"
    with tempfile.TemporaryDirectory() as work:
        root = Path(work, NAME)
        root.mkdir()
        lay(root, LAYOUT)
        _documents(root)
        _control(root)
        settle(root)
        # One thread: what xz writes depends on how many there are.
        words = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(made)]
        settings = {"SOURCE_DATE_EPOCH": str(epoch()), "DPKG_DEB_THREADS_MAX": "1"}
        subprocess.run(words, env={**os.environ, **settings}, check=True, stdout=subprocess.DEVNULL)
    return made


def _documents(root: Path) -> None:
    """What Debian's policy asks for in /usr/share/doc."""
    year = time.strftime("%Y", time.gmtime(epoch()))
    copyright_text = (SOURCES / "copyright").read_text(encoding="utf-8").replace("@YEAR@", year)
    write(root / DOCS / "copyright", copyright_text)
    entry = f"  * See {DOCS.joinpath('CHANGELOG.md.gz')}."
    text = f"{NAME} ({VERSION}) stable; urgency=medium\n\n{entry}\n\n -- {MAINTAINER}  {formatdate(epoch())}\n"
    write_compressed(root / DOCS / "changelog.gz", text)


def _control(root: Path) -> None:
    """Everything in DEBIAN/; deb-control(5)."""
    files = [path for path in everything(root) if path.is_file()]
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n" for path in files]  # noqa: S324
    values = {
        "@VERSION@": VERSION,
        "@MAINTAINER@": MAINTAINER,
        "@SIZE@": str(sum(path.stat().st_size for path in files) // 1024),
        "@DESCRIPTION@": textwrap.fill(DESCRIPTION, 78, initial_indent=" ", subsequent_indent=" "),
        "@UNITS@": " ".join(UNITS),
        "@FOLDERS@": " ".join(f"/etc/systemd/system/{name}" for name in _folders()),
    }
    control = root / "DEBIAN"
    for name in ("control", *SCRIPTS):
        text = (SOURCES / name).read_text(encoding="utf-8")
        for mark, value in values.items():
            text = text.replace(mark, value)
        write(control / name, text, 0o755 if name in SCRIPTS else 0o644)
    write(control / "conffiles", f"/{EXAMPLE}\n")
    write(control / "md5sums", "".join(sums))


def _folders() -> list[str]:
    """Those that the units and their links may have needed, below systemd's."""
    links = (watch.LINK, systemd.DROP_IN, *neighbours.links())
    return sorted({str(Path(link).parent) for link in links})


if __name__ == "__main__":
    print(build())

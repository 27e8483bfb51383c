"""What the next boot will do about the redirection."""

from __future__ import annotations

from pathlib import Path

from tpctl.persist import direct_xml, files, firewalld, systemd
from tpctl.persist.image import shown, within
from tpctl.system.errors import HostError


def next_boot(root: Path = Path("/")) -> tuple[str, ...]:
    """A line for everything that will install something; none when the redirection ends with this boot."""
    lines = []
    if systemd.is_enabled(root):
        lines.append(f"{systemd.SERVICE} installs what {shown(root, systemd.CONFIG)} says{_missing_config(root)}")
    if systemd.has_drop_in(root):
        config = shown(root, systemd.CONFIG)
        lines.append(f"kuma-dp.service installs what {config} says before it starts{_missing_config(root)}")
    if systemd.is_enabled(root, systemd.ENVOY):
        where = shown(root, systemd.ENVOY_CONFIG)
        missing = "" if within(root, systemd.ENVOY_CONFIG).is_file() else ", but that file is missing"
        lines.append(f"{systemd.ENVOY} has Envoy serve what {where} says{missing}")
    stored = _stored(root)
    if stored:
        lines.append(stored)
    return tuple(lines)


def _missing_config(root: Path) -> str:
    return "" if within(root, systemd.CONFIG).is_file() else ", but that file is missing"


def _stored(root: Path) -> str | None:
    try:
        path = within(root, firewalld.DIRECTORY / "direct.xml")
        content = files.read(path)
        if content is None or not direct_xml.holds_ours(content):
            return None
    except (HostError, direct_xml.UnreadableError):
        return None
    wanted = (within(root, place / systemd.WANTED / "firewalld.service", follow=False) for place in systemd.PLACES)
    if any(link.is_symlink() for link in wanted):
        return "firewalld installs the rules in its direct.xml"
    return "firewalld would install the rules in its direct.xml, but is not enabled"

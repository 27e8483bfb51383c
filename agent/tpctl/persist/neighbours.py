"""The unit that puts our rules back in their place whenever other software with rules has been started or restarted."""

from __future__ import annotations

from importlib import resources

SERVICE = "tpctl-order.service"


def names() -> tuple[str, ...]:
    """The services after which it comes, and which start it (systemd.unit(5), "WantedBy=")."""
    text = resources.files("tpctl.persist").joinpath("units", SERVICE).read_text(encoding="utf-8")
    after = (line.removeprefix("After=") for line in text.splitlines() if line.startswith("After="))
    return tuple(name for line in after for name in line.split() if not name.startswith("tpctl"))


def links() -> tuple[str, ...]:
    """What enables it, below the folder of units. A link for a service that the host does not have means nothing."""
    return tuple(f"{name}.wants/{SERVICE}" for name in names())

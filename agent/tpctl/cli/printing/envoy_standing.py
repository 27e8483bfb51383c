"""What `tpctl status` tells of an Envoy that `tpctl envoy run` has started."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpctl.envoy.process.standing import Found


def rows(found: Found) -> Iterator[tuple[str, str]]:
    """Names and values, a line each."""
    standing = found.standing
    if standing.envoy:
        does = "serves" if found.serves else "should serve"
        yield "Envoy", f"pid {standing.envoy} {does} {standing.file}, started {_times(standing.starts)}"
        versions = (f"{what} {standing.versions.get(file, 'none')}" for what, file in found.documents)
        yield "Envoy's versions", f"{', '.join(versions)}; {standing.refused} updates refused"
        yield "Envoy's connections", f"at most {standing.connections}"
    else:
        yield "Envoy", f"should serve {standing.file}, and does not run"
    if standing.dns:
        where = ", ".join(standing.dns)
        if standing.dns_pid:
            does = "answers" if found.answers else "should answer"
            yield "DNS beside Envoy", f"pid {standing.dns_pid} {does} {where}, started {_times(standing.dns_starts)}"
        else:
            yield "DNS beside Envoy", f"{where}: nobody answers"


def data(found: Found | None) -> dict[str, Any] | None:
    """The same for --json."""
    if found is None:
        return None
    standing = found.standing
    return {
        "file": standing.file,
        "serves": found.serves,
        "pid": standing.envoy or None,
        "supervisorPid": standing.supervisor,
        "starts": standing.starts,
        **{what.lower(): standing.versions.get(file) for what, file in found.documents},
        "refusedUpdates": standing.refused,
        "needsRestart": standing.restart,
        "connections": standing.connections,
        "dns": {
            "listens": standing.dns,
            "answers": found.answers,
            "pid": standing.dns_pid or None,
            "starts": standing.dns_starts,
        }
        if standing.dns
        else None,
        "problems": list(found.problems),
    }


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"

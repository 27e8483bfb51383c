"""What runs inside a machine: real connections, compared with what `decide()` says of them.

    python probing.py POLICY     POLICY is a file with a policy as `tpctl status --json` prints it

A peer is made in a network namespace and connected by a cable; the host's part is the machine's own namespace, in which
nothing is installed here. The data plane's part is played by listeners under its user. Prints a JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, seat, stage
from tpctl.rehearsal.namespaces import Namespace
from tpctl.rehearsal.probes import probes
from tpctl.rehearsal.rehearse import Result, attempt
from tpctl.spec.document import from_document
from tpctl.spec.policy import Policy

SSHD = (HOST, 22)
"""Its place is taken; that it is reached, the tests see by themselves."""
_SETTLE_SECONDS = 1.0


def tried(policy: Policy) -> list[Result]:
    """Every probe of a policy."""
    staging = stage(policy)
    with Lab(staging.layout, host=Namespace.current()) as lab:
        lab.serve_data_plane(staging.policy)
        time.sleep(_SETTLE_SECONDS)  # until the links are up
        wanted = (one for one in probes(staging.policy, staging.layout) if seat(lab.layout, one.connection) != SSHD)
        return list(attempt(lab, staging.policy, wanted))


def main() -> None:
    """Say how many connections there were, where they should have ended, and which of them did not."""
    results = tried(from_document(json.loads(Path(sys.argv[1]).read_text())))
    wrong = [f"{one.probe.label}: expected {one.expected}, got {one.answer}" for one in results if not one.ok]
    ended = Counter(str(one.expected) for one in results)
    print(json.dumps({"connections": len(results), "wrong": wrong, "ended": ended}))


if __name__ == "__main__":
    main()

"""The conntrack zones of DNS traffic; `tpctl.spec.decide.zone` says what is in which."""

from __future__ import annotations

DEFAULT_ZONE = 0
UPSTREAM_ZONE = 1
"""Queries that leave the host for a name server, and their answers."""
CAPTURED_ZONE = 2
"""Queries that are redirected to the data plane, and its answers."""

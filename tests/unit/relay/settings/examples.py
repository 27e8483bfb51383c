"""A whole configuration file, and how complaints about one are compared."""

from __future__ import annotations

import pytest

from tpctl.config.yaml_text import parse_yaml
from tpctl.relay.settings.file import settings_of
from tpctl.relay.settings.model import Settings
from tpctl.system.errors import InputError


def assert_problems(action: object, problems: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        action()  # type: ignore[operator]
    said = raised.value.problems
    assert len(said) == len(problems), said
    for line, expected in zip(said, problems, strict=True):
        assert line.startswith(expected), line


FULL = """
workers: 2
drain_timeout: 5s
access_log: true
user: kuma-dp
metrics: 127.0.0.1:9902
dns: {resolv_conf: /run/resolv.conf, zone: internal}
trusted_ips: [10.0.0.0/8, "unix:"]
limits: {connections: 1000}
timeouts: {connect: 500ms, idle: 1h}
listeners:
  - listen: "[::]:15006 ipv6only=off reuseport proxy_protocol"
    direction: inbound
    send_proxy_protocol: v2
    access: {allow: [10.0.0.0/8], deny: [10.6.0.0/16]}
    limits: {connections_per_source: 10}
    timeouts: {half_closed: 30}
  - name: database
    listen: 127.0.0.1:5432
    direction: outbound
    upstream: 192.0.2.7:5432
    trusted_ips: []
    access: {default: deny}
  - listen: "*:15053"
    direction: dns
"""


def settings(text: str) -> Settings:
    return settings_of(parse_yaml(text), "r.yaml")

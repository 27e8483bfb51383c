"""A configuration survives the record: what was given comes back as it was, by the same origins."""

from __future__ import annotations

import json

import pytest

from tpctl.config import inputs
from tpctl.config.effective import Config
from tpctl.config.load import load
from tpctl.config.options import BY_NAME, OPTIONS
from tpctl.system.errors import InputError

GIVEN = {
    "proxy_user": ["kuma-dp"],
    "ip_family_mode": ["ipv4"],
    "inbound_exclude_ports": ["22,8000-8100"],
    "inbound_exclude_sources": ["10.0.0.0/8,fd00::/8"],
    "outbound_exclude_uids": ["udp:53:101", "tcp:1-1024:0-99"],
    "virtual_networks": ["docker0:172.17.0.0/16", "br+:fd00:1::/64"],
    "dns_enabled": ["true"],
    "ssh_guard": ["true"],
    "sleep_between_retries": ["1500ms"],
    "cgroup": ["system.slice/app.service"],
    "resolv_conf": ["/run/r.conf"],
}


def returned(config: Config) -> Config:
    return inputs.from_document(json.loads(json.dumps(inputs.to_document(config))))


def test_what_was_given_comes_back() -> None:
    config = load(flags=GIVEN)
    found = returned(config)
    for option in OPTIONS:
        assert getattr(found, option.name) == getattr(config, option.name), option.name
        assert found.origins[option.name] == config.origins[option.name]
    assert found == config._replace(notices=())


def test_only_what_was_given_is_kept() -> None:
    assert inputs.to_document(load()) == {}
    document = inputs.to_document(load(flags={"proxy_user": ["app"], "verbose": ["true"], "dry_run": ["true"]}))
    assert document == {"kumaDPUser": {"value": "app", "origin": "flag --kuma-dp-user"}}


def test_what_a_newer_version_added_is_passed_over() -> None:
    config = load(flags={"proxy_user": ["app"]})
    assert (
        inputs.from_document({**inputs.to_document(config), "invented": {"value": 1, "origin": "flag --x"}}) == config
    )


def test_a_value_that_cannot_be_read_is_named() -> None:
    key = BY_NAME["inbound_port"].key
    with pytest.raises(InputError, match=r"file f: port: .*70000"):
        inputs.from_document({key: {"value": 70000, "origin": "file f: port"}})

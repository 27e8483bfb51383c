"""The facts are those of the network namespace tpctl runs in, not those of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.root

ASK = """
import json
from ipaddress import ip_address
from tpctl.host.facts import LiveHost
from tpctl.host import interfaces, routes
host = LiveHost()
route = routes.to_address(ip_address("10.123.0.9"))
way = route and [str(route.source), routes.interface_name(route.interface)]
print(json.dumps([interfaces.names(), host.has_ipv6(), host.is_local(ip_address("10.123.0.5")), way]))
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"tpctl-facts-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def ask(namespace: str) -> list[object]:
    """The facts, seen by a process that entered the namespace without a /sys of its own."""
    argv = ["nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-c", ASK]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    answer: list[object] = json.loads(done.stdout)
    return answer


def ip(namespace: str, *words: str) -> None:
    subprocess.run(["ip", "-n", namespace, *words], check=True)


def test_facts_follow_the_namespace(namespace: str) -> None:
    links, *facts = ask(namespace)
    assert isinstance(links, list)
    assert "lo" in links  # where a module for tunnels is loaded, each namespace has a link of that as well
    assert facts == [False, False, None]
    ip(namespace, "link", "set", "lo", "up")
    ip(namespace, "-6", "addr", "add", "::6/128", "dev", "lo")
    assert ask(namespace)[1] is False
    ip(namespace, "link", "add", "fact0", "type", "veth", "peer", "name", "fact1")
    ip(namespace, "addr", "add", "10.123.0.5/24", "dev", "fact0")
    for name in ("fact0", "fact1"):
        ip(namespace, "link", "set", name, "up")
    ip(namespace, "addr", "add", "fe80::5/64", "dev", "fact0", "nodad")
    names, ipv6, local, route = ask(namespace)
    assert isinstance(names, list)
    assert sorted(names) == sorted(["fact0", "fact1", *links])
    assert ipv6 is True  # the link-local address
    assert local is True
    assert route == ["10.123.0.5", "fact0"]

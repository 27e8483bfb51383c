"""What tpctl reads as root under random input: configurations, variables, records, direct.xml, listings of rules.

Each is read, or refused with its own error, whose every line is short and can be shown on a terminal.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.relay import Target
from tests.unit.record.test_state import RECORD
from tpctl.change import confirm
from tpctl.change.before import Before
from tpctl.config import load as config
from tpctl.config.options import OPTIONS
from tpctl.config.values import BadValueError
from tpctl.engines import direct, preview
from tpctl.engines.iptables import saved
from tpctl.engines.iptables.change import Delete, change, restore_text
from tpctl.engines.iptables.parts import TableRules
from tpctl.engines.iptables.plan import IptablesPlan
from tpctl.persist import direct_xml
from tpctl.record import state
from tpctl.relay.process import activation, notify
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Policy
from tpctl.system.errors import InputError

MAX_LINE = 2000


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Let the block refuse its input."""
    try:
        yield
    except InputError as error:
        for problem in error.problems:
            assert problem.isprintable(), problem
            assert len(problem) < MAX_LINE, problem


@functools.cache
def _file(name: str) -> Path:
    """A file of this process's own, as long as that runs."""
    folder = tempfile.mkdtemp(prefix="fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder, name)


def feed_configuration(data: bytes) -> None:
    """A configuration, or what is wrong with it; what it says is shown and resolved."""
    path = _file("config.yaml")
    path.write_bytes(data)
    with refused():
        for notice in config.load(files=[str(path)]).notices:
            assert notice.isprintable(), notice


def feed_dataplane(data: bytes) -> None:
    """A Dataplane resource, or what is wrong with it."""
    path = _file("dataplane.yaml")
    path.write_bytes(data)
    with refused():
        config.load(flags={"dataplane_file": [str(path)], "dataplane_variables": ["a=1", "port=80"]})


def feed_environment(data: bytes) -> None:
    """Variables as the kernel hands them over: bytes that are decoded with surrogates."""
    words = [os.fsdecode(word) for word in data.split(b"\0")]
    environ = dict(word.partition("=")[::2] for word in words)
    with refused():
        config.load(environ=environ)
    activation.count(environ, 1)
    before = dict(os.environ)
    try:
        os.environ.update({name: value for name, value in environ.items() if name in _READ})
        from tpctl.host import ssh

        ssh.port_of(environ.get("SSH_CONNECTION", ""))
        notify.watchdog_interval()
        notify.notify("READY=1")
    finally:
        os.environ.clear()
        os.environ.update(before)


def feed_record(data: bytes) -> None:
    """A record that can be carried out, or none."""
    found = _read(data, state.of_document)
    if isinstance(found, state.State):
        assert state.of_document(json.loads(json.dumps(state.document_of(found)))).policy == found.policy
        IptablesPlan.of_policy(found.policy, found.options).render()
        preview.ruleset(found.policy, EngineOptions(engine="iptables"))
    _read(data, confirm._of_document)


def _read(data: bytes, of: object) -> object:
    path = _file("state.json")
    path.write_bytes(data)
    return state.read(path, of)  # type: ignore[arg-type]


def feed_direct_xml(data: bytes) -> None:
    """What is not ours stays, byte for byte; what cannot be understood is refused."""
    try:
        rest = direct_xml.without_ours(data)
        assert direct_xml.without_ours(rest) == rest
        assert direct_xml.without_ours(direct_xml.with_rules(rest, _rules())) in (rest, _opened(rest))
    except direct_xml.UnreadableError:
        return


def _opened(content: bytes) -> bytes:
    """An empty <direct/> is opened when something is put into it."""
    return direct_xml.without_ours(direct_xml.with_rules(content, _rules()))


@functools.cache
def _rules() -> direct.DirectRules:
    return direct.of_policy(Policy(5678), EngineOptions())


def feed_listing(data: bytes) -> None:
    """Whatever iptables-save prints: only rules that jump to our chains, and those chains, are taken out."""
    for table in saved.read(data.decode("utf-8", "replace")).values():
        for rule in table.rules:
            saved.comment_of(rule.text)
            saved.looks_like_kumactl(rule.text)
        removal = change(table, TableRules(table.name))
        restore_text((removal,))
        for operation in removal.operations:
            whose = operation.text if isinstance(operation, Delete) else operation.chain
            assert "TPCTL_" in whose or "KUMA_MESH_" in whose or saved.KUMA_COMMENT in whose


def feed_values(data: bytes) -> None:
    """A text for every option at once, as flag and as variable."""
    text = os.fsdecode(data)
    for option in OPTIONS:
        with contextlib.suppress(BadValueError):
            option.read(text, lambda note: None)


_READ = ("SSH_CONNECTION", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "FDSTORE")
_CONFIG = b"""kumaDPUser: kuma-dp
base: &b {enabled: true, port: 15006}
redirect:
  inbound: {<<: *b, excludePorts: [22, "8000-8100"], excludePortsForIPs: [10.0.0.0/8, "fd00::/8"]}
  outbound: {port: 0x3a99, excludePortsForUIDs: ["udp:53:1000-2000", 53:10, 1e3]}
  dns: {enabled: yes, captureAll: no, port: 15053, resolvConfigPath: /etc/resolv.conf}
  vnet: {networks: ["docker0:172.17.0.0/16"]}
ipFamilyMode: dualstack
sleepBetweenRetries: 2s
retry: {maxRetries: 4, sleepBetweenRetries: "2s"}
iptablesExecutables: {iptables: /sbin/iptables}
log: {enabled: ~, level: !!int "7"}
"""
_DATAPLANE = b"""type: Dataplane
mesh: default
name: {{ name }}
networking:
  address: 10.0.0.1
  inbound: [{port: {{port}}, servicePort: 8080, tags: &t {a: b}}, {port: 81, tags: *t}]
  transparentProxying: {redirectPortInbound: 15006, redirectPortOutbound: 15001, ipFamilyMode: IPv4}
"""
_VARIABLES = b"\0".join(
    (b"TPCTL_REDIRECT_INBOUND_PORT=15006", b"KUMA_TRANSPARENT_PROXY_KUMA_DP_USER=x", b"TPCTL_ENGINE=nftables",
     b"TPCTL_REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS=tcp:22:1000;udp:53:0-9", b"KUMA_TRANSPARENT_PROXY_CNI_MODE=true",
     b"TPCTL_NO_SUCH_THING=\xff\x1b[1m", b"SSH_CONNECTION=10.0.0.1 4000 10.0.0.2 22", b"NOTIFY_SOCKET=@x",
     b"WATCHDOG_USEC=20000000", b"LISTEN_FDS=3", b"LISTEN_PID=1", b"PATH=/bin:.")
)  # fmt: skip
_DIRECT = b"""<?xml version="1.0" encoding="utf-8"?>
<direct>
  <!-- theirs -->
  <chain ipv="ipv4" table="nat" chain="TPCTL_DNS"/>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="0">-p tcp -m comment --comment 'tpctl/ &lt;' -j TPCTL_X</rule>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="0">-p tcp -j RETURN</rule>
  <passthrough ipv="ipv4">-t nat -A KUMA_MESH_X -j RETURN</passthrough>
</direct>
"""
_LISTING = b"""# Generated by iptables-save
*nat
:OUTPUT ACCEPT [0:0]
:TPCTL_OUTBOUND - [0:0]
[3:180] -A OUTPUT -p tcp -m comment --comment "tpctl/\\"x\\" \\\\ y\n-A OUTPUT -j TPCTL_X" -j RETURN
-A OUTPUT ! -d 127.0.0.1/32 -p tcp -m comment --comment "tpctl/o" -j TPCTL_OUTBOUND
-A OUTPUT -p udp -m udp --dport 53 -m comment --comment kuma/mesh/transparent/proxy/x -j REDIRECT --to-ports 15053
-A TPCTL_OUTBOUND -j RETURN
COMMIT
"""
_RECORD = json.dumps(state.document_of(RECORD)).encode()
_PENDING = json.dumps(
    {"format": 1, "version": "0", "command": "install", "seconds": 60.0, "deadline": 1e9, "token": "ab",
     "guardian": "timer", "before": {"record": state.document_of(Before(RECORD).record or RECORD), "holdings": {}}}
).encode()  # fmt: skip
TARGETS = (
    Target("policy configuration", feed_configuration, [_CONFIG, b"{}", b"redirect: {inbound: {port: 1}}"]),
    Target("Dataplane", feed_dataplane, [_DATAPLANE, b"kind: Dataplane\nspec:\n  networking: {gateway: {}}"]),
    Target("environment", feed_environment, [_VARIABLES]),
    Target("values", feed_values, [b"15006", b"tcp:1-2:0-9", b"docker0:10.0.0.0/8", b"fd00::/8,10.1.1.1", b"2s", b"a=b",
                                   b"/sys/fs/cgroup/a.slice/b", b"iptables:/sbin/iptables"]),
    Target("records", feed_record, [_RECORD, _PENDING, b"[[[]]]", b'{"format": 1}']),
    Target("direct.xml", feed_direct_xml, [_DIRECT, direct_xml.EMPTY, b"<direct/>", b"<direct></direct>"]),
    Target("listing of rules", feed_listing, [_LISTING]),
)  # fmt: skip

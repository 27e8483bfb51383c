"""The DNS proxies of `make bench-dns`: each forwards to one name server, and has the same local names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.bench.planes import SERVER, process
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import RELAY_USER, Net

BESIDE = "dnsmasq"
PLANES = ("relay", BESIDE, "dnsmasq-cache", "unbound", "coredns", "none")
"""None but dnsmasq-cache remembers answers of the name server. `none` is the name server itself."""
FORWARDED, LOCAL = "forwarded", "local"
"""What is asked, and the files of queries for dnsperf."""
NAMES = 1000
DNS_PORT = 15053
_LISTEN = "127.0.0.1"
"""Where the rule redirects this host's queries to."""
_USER = ("setpriv", f"--reuid={RELAY_USER}", "--clear-groups")
"""Before a socket is opened: the rules tell the proxy's packets by the user who did it."""

_UNBOUND = """
server:
    directory: "{folder}"
    chroot: ""
    username: ""
    pidfile: "{folder}/{name}.pid"
    logfile: "/dev/null"
    verbosity: 0
    num-threads: 1
    interface: {interface}
    access-control: 0.0.0.0/0 allow
    module-config: "iterator"
    minimal-responses: no
"""
_NAME_SERVER = """
    local-zone: "example.net." redirect
    local-data: "example.net. 60 IN A 192.0.2.7"
"""
_FORWARDER = f"""
    cache-max-ttl: 0
    outgoing-range: 4096
    local-zone: "mesh." static
    include: "{{folder}}/local-data"
forward-zone:
    name: "."
    forward-addr: {SERVER}
remote-control:
    control-enable: no
"""
_COREDNS = f"""
.:{DNS_PORT} {{{{
    bind {_LISTEN}
    hosts {{folder}}/hosts mesh
    forward . {SERVER}
}}}}
"""


@contextlib.contextmanager
def upstream(net: Net, folder: Path) -> Iterator[None]:
    """The name server on the peer: unbound, which has every name below example.net. Writes all files as well."""
    local = [f"n{number}.mesh" for number in range(NAMES)]
    forwarded = [f"n{number}.example.net" for number in range(NAMES)]
    hosts = [f"10.0.{number // 250}.{number % 250 + 1}" for number in range(NAMES)]
    for file, names in ((LOCAL, local), (FORWARDED, forwarded)):
        _write(folder / file, [f"{name} A" for name in names])
    _write(folder / "hosts", [f"{host} {name}" for host, name in zip(hosts, local, strict=True)])
    data = [f'local-data: "{name}. 60 IN A {host}"' for host, name in zip(hosts, local, strict=True)]
    _write(folder / "local-data", data)
    with _unbound(net, folder, "upstream", SERVER, _NAME_SERVER, net.peer):
        yield


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def _unbound(net: Net, folder: Path, name: str, interface: str, rest: str, space: str) -> Iterator[None]:
    configuration = folder / f"{name}.conf"
    configuration.write_text((_UNBOUND + rest).format(folder=folder, name=name, interface=interface))
    port = int(interface.partition("@")[2] or "53")
    user = () if space == net.peer else _USER
    with process(net, *user, "unbound", "-d", "-p", "-c", str(configuration), port=port, space=space):
        yield


@contextlib.contextmanager
def plane(net: Net, name: str, folder: Path) -> Iterator[None]:
    """A proxy on our host, as the user whose queries are not redirected."""
    with contextlib.ExitStack() as stack:
        if name == "relay":
            (folder / "resolv.conf").write_text(f"nameserver {SERVER}\n")
            options = ("--resolv-conf", str(folder / "resolv.conf"), "--dns-zone-file", str(folder / "hosts"))
            stack.enter_context(relay_net.relay(net, folder, *options))
        elif name.startswith(BESIDE):
            size = NAMES * 2 if name.endswith("cache") else 0
            argv = (
                "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file",
                f"--server={SERVER}", f"--cache-size={size}", f"--addn-hosts={folder}/hosts", "--local=/mesh/",
                f"--port={DNS_PORT}", "--bind-interfaces", f"--listen-address={_LISTEN}", "--log-facility=/dev/null",
                "--dns-forward-max=1000", "--local-ttl=60",
            )  # fmt: skip
            stack.enter_context(process(net, *_USER, *argv, port=DNS_PORT))
        elif name == "unbound":
            stack.enter_context(_unbound(net, folder, name, f"{_LISTEN}@{DNS_PORT}", _FORWARDER, net.host))
        elif name == "coredns":
            (folder / "Corefile").write_text(_COREDNS.format(folder=folder))
            program = ("env", "GOMAXPROCS=1", "coredns", "-quiet", "-conf", str(folder / "Corefile"))
            stack.enter_context(process(net, *_USER, *program, port=DNS_PORT))
        yield

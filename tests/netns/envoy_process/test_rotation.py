"""Every kind of secret is replaced while clients ask all the time, and none of their requests fails."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.extent import takes_long
from tests.netns.envoy_process.plant import (
    WEB,
    Application,
    Client,
    EnvoyRun,
    Load,
    application,
    configuration,
    load,
    put,
    running,
)
from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Authority, Pki, client_context
from tests.netns.relay.net import HOST4, HOST6, Net, for_the_relay, until
from tests.netns.relay.test_reload import stopped
from tests.unit.envoy.examples import new_key, token, write_jwks

pytestmark = pytest.mark.root
TLS, BEHIND = 8443, 9443
WAYS = ("renamed", "written", "linked")
"""How an administrator, or a program of his, replaces a file."""


class Scene:
    """An Envoy with a secret of every kind, in front of applications with and without TLS."""

    def __init__(self, net: Net, there: Path) -> None:
        self.net = net
        self.there = there
        self.pki = Pki(there)
        self.behind = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.behind.verify_mode = ssl.CERT_REQUIRED
        self.behind.load_cert_chain(*self.pki.middle.issue("behind", "DNS:behind.test"))
        self.behind.load_verify_locations(self.pki.root.path)
        self.behind.load_verify_locations(self.pki.other.path)
        for name, word in (("current", "first"), ("previous", "zeroth"), ("injected", "one")):
            put(there / name, word)
        self.copy("shown", self.pki.server)
        self.copy("ours", self.pki.client)
        shutil.copy(self.pki.root.path, there / "clients.pem")
        shutil.copy(self.pki.root.path, there / "upstream.pem")
        self.keys = [new_key(there / f"jwt{number}.key") for number in range(2)]
        write_jwks(there / "jwks.json", self.keys[0])
        self.origin = "first"
        self.token = token(self.keys[0], aud="web")

    def copy(self, name: str, pair: tuple[Path, Path]) -> None:
        """Have a certificate and its key under the names that Envoy's file knows."""
        for ending, path in zip(("crt", "key"), pair, strict=True):
            put(self.there / f"{name}.{ending}", path.read_text())

    def file(self) -> str:
        there = self.there
        jwt = f"{{issuer: 'https://issuer.test', audiences: [web], jwks_file: {there}/jwks.json}}"
        return configuration(
            f"{{port: {WEB}, name: web, protocol: http, jwt: {jwt}, origin_verify: {{header: X-Origin, "
            "secrets: [current, previous]}, inject_headers: {X-Key: {secret: injected}}}",
            f"{{port: {TLS}, name: tls, protocol: http, upstream: '127.0.0.1:{BEHIND}', "
            f"ssl: {{certificate: {there}/shown.crt, certificate_key: {there}/shown.key, "
            f"client_ca_file: {there}/clients.pem, verify_client: on}}, "
            f"upstream_tls: {{server_name: behind.test, ca_file: {there}/upstream.pem, "
            f"certificate: {there}/ours.crt, certificate_key: {there}/ours.key}}}}",
            more="workers: 2\nsecrets:\n"
            + "".join(f"  {name}: {{file: {there}/{name}}}\n" for name in ("current", "previous", "injected")),
        )

    def ask(self, client: Client, *, keep: bool = True) -> Any:
        """A request with the origin's secret and a token; what the application says."""
        headers = {"X-Origin": self.origin, "Authorization": f"Bearer {self.token}"}
        status, told = client.get("/", headers, keep=keep)
        assert status == 200, (status, told)
        assert told["headers"]["x-key"] in ("one", "two"), told
        assert "x-origin" not in told["headers"]
        return told

    def ask_tls(self, client: Client, *, keep: bool = False) -> Any:
        status, told = client.get(keep=keep)
        assert status == 200, (status, told)
        return told

    def tls(self, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """Of a client that trusts both authorities."""
        context = client_context(self.pki, certificate or self.pki.client)
        context.load_verify_locations(self.pki.other.path)
        return context


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with relay_net.network() as net, relay_net.public_directory() as there:
        made = Scene(net, there)
        listening = application(net)
        with listening, contextlib.ExitStack() as stack:
            stack.enter_context(behind(made))
            yield made


@contextlib.contextmanager
def behind(scene: Scene) -> Iterator[None]:
    server = Application(scene.net, ("127.0.0.1", BEHIND), scene.behind)
    try:
        yield
    finally:
        server.close()


@pytest.fixture(scope="module")
def envoy(scene: Scene) -> Iterator[EnvoyRun]:
    with running(scene.net, scene.there, scene.file()) as made:
        yield made


@pytest.fixture
def asking(scene: Scene, envoy: EnvoyRun) -> Iterator[Load]:
    """Clients that keep their connections, and clients that do not, in both families, with TLS and without."""
    clients: list[Client] = []

    def client(address: tuple[str, int], context: ssl.SSLContext | None = None) -> Client:
        clients.append(Client(scene.net, address, context))
        return clients[-1]

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: close(clients))
        made = stack.enter_context(load())
        for host in (HOST4, HOST6):
            kept, fresh = client((host, WEB)), client((host, WEB))
            made.add(lambda kept=kept: scene.ask(kept), f"kept {host}")  # type: ignore[misc]
            made.add(lambda fresh=fresh: scene.ask(fresh, keep=False), f"fresh {host}")  # type: ignore[misc]
        context = scene.tls()
        shaking, held = client((HOST4, TLS), context), client((HOST6, TLS), context)
        made.add(lambda: scene.ask_tls(shaking), "TLS, fresh")
        made.add(lambda: scene.ask_tls(held, keep=True), "TLS, kept")
        made.goes_on()
        yield made
    # Of each secret, one copy is left.
    until(lambda: len(list(envoy.folder.glob("sds/*/*/"))) == len(list(envoy.folder.glob("sds/*"))))


def close(clients: list[Client]) -> None:
    for one in clients:
        one.close()


def replace(path: Path, text: str, way: str) -> None:
    """Replace a file's content in one of the ways."""
    if way == "renamed":
        put(path, text)
    elif way == "written":
        if path.is_symlink():
            path.unlink()
        path.write_text(text)
        for_the_relay(path)
    else:
        target = path.with_name(f"{path.name}.{abs(hash(text))}")
        put(target, text)
        link = path.with_name(f".{path.name}.link")
        link.symlink_to(target)
        link.rename(path)


def served(scene: Scene, context: ssl.SSLContext | None = None, path: str = "/") -> tuple[str, Any]:
    """The serial number of the certificate that a client is shown, and what the application says."""
    sock = scene.net.connect(scene.net.peer, (HOST4, TLS))
    with (context or scene.tls()).wrap_socket(sock, server_hostname="server.test") as tls:
        certificate: Any = tls.getpeercert()
    client = Client(scene.net, (HOST4, TLS), context or scene.tls())
    try:
        return str(certificate["serialNumber"]), client.get(path)[1]
    finally:
        client.close()


def refused(ask: Callable[[], Any]) -> bool:
    try:
        ask()
    except (OSError, AssertionError, ssl.SSLError):
        return True
    return False


@pytest.mark.parametrize("way", ["renamed", *(pytest.param(way, marks=takes_long) for way in WAYS[1:])])
def test_the_origins_secret(scene: Scene, envoy: EnvoyRun, asking: Load, way: str) -> None:
    """The old one becomes the previous one, both are taken, clients change, and then the old one goes."""
    old, new = scene.origin, f"{way}-next"
    with envoy.taken(), stopped(envoy.process.pid):
        replace(scene.there / "previous", old, way)
        replace(scene.there / "current", new, way)
    asking.goes_on()
    scene.origin = new
    asking.goes_on()
    with envoy.taken():
        replace(scene.there / "previous", "nobody's", way)
    asking.goes_on()
    client = Client(scene.net, (HOST4, WEB))
    headers = {"X-Origin": old, "Authorization": f"Bearer {scene.token}"}
    assert client.get(headers=headers, keep=False)[0] == 403


@takes_long
@pytest.mark.parametrize("way", WAYS)
def test_an_injected_header(scene: Scene, envoy: EnvoyRun, asking: Load, way: str) -> None:
    client = Client(scene.net, (HOST4, WEB))
    for word in ("two", "one"):
        with envoy.taken():
            replace(scene.there / "injected", word, way)
        asking.goes_on()
        assert scene.ask(client, keep=False)["headers"]["x-key"] == word


@takes_long
@pytest.mark.parametrize("way", WAYS)
def test_the_servers_certificate(scene: Scene, envoy: EnvoyRun, asking: Load, way: str) -> None:
    before, _ = served(scene)
    certificate, key = scene.pki.middle.issue(f"server-{way}", "DNS:server.test")
    with envoy.taken():  # the key comes a while after its certificate
        replace(scene.there / "shown.crt", certificate.read_text(), way)
        replace(scene.there / "shown.key", key.read_text(), way)
    asking.goes_on()
    assert served(scene)[0] != before


def test_a_certificate_without_its_key_is_not_taken(scene: Scene, envoy: EnvoyRun, asking: Load) -> None:
    before, _ = served(scene)
    certificate, key = scene.pki.middle.issue("server-late", "DNS:server.test")
    with envoy.taken("the configuration is invalid, the old one stays"):
        put(scene.there / "shown.crt", certificate.read_text())
    asking.goes_on()
    assert served(scene)[0] == before
    with envoy.taken():
        put(scene.there / "shown.key", key.read_text())
    asking.goes_on()
    assert served(scene)[0] != before


@takes_long
def test_an_update_that_is_refused_while_a_certificate_is_replaced(scene: Scene, envoy: EnvoyRun, asking: Load) -> None:
    """Envoy has taken the certificate already when it refuses the rest: it gets the old one back, until all is well."""
    before, _ = served(scene)
    certificate, key = scene.pki.middle.issue("server-refused", "DNS:server.test")
    good = envoy.file.read_text()
    with scene.net.inside(scene.net.host):
        other = socket.create_server(("0.0.0.0", 15009))
    refusing = envoy.taken("Envoy has refused an update, the old configuration stays")
    with other, refusing, stopped(envoy.process.pid):
        put(scene.there / "shown.crt", certificate.read_text())
        put(scene.there / "shown.key", key.read_text())
        envoy.file.write_text(good + '  - {listen: "0.0.0.0:15009", direction: outbound}\n')
    asking.goes_on()
    assert served(scene)[0] == before
    with envoy.taken():
        envoy.send(signal.SIGHUP)
    asking.goes_on()
    assert served(scene)[0] != before
    with envoy.taken():
        envoy.file.write_text(good)


@takes_long
def test_the_authorities_of_clients(scene: Scene, envoy: EnvoyRun, asking: Load) -> None:
    """Another one is added, clients change, and the first one goes."""
    other = scene.tls(scene.pki.other.issue("client-of-other"))
    assert refused(lambda: served(scene, other))
    root = scene.pki.root.path.read_text()
    both = root + scene.pki.other.path.read_text()
    with envoy.taken():
        put(scene.there / "clients.pem", both)
    asking.goes_on()
    served(scene, other)
    with envoy.taken():
        put(scene.there / "clients.pem", root)
    asking.goes_on()
    assert refused(lambda: served(scene, other))


@takes_long
def test_the_authorities_and_the_certificate_towards_an_upstream(scene: Scene, envoy: EnvoyRun, asking: Load) -> None:
    """The upstream gets a certificate of another authority, and Envoy another certificate for it."""

    def issuer(told: Any) -> str:
        return str(dict(pair for one in told["certificate"]["issuer"] for pair in one)["commonName"])

    assert issuer(served(scene)[1]) == "middle"
    root = scene.pki.root.path.read_text()
    other: Authority = scene.pki.other
    with envoy.taken():
        put(scene.there / "upstream.pem", root + other.path.read_text())
    asking.goes_on()
    scene.behind.load_cert_chain(*other.issue("behind-other", "DNS:behind.test"))
    asking.goes_on()
    with envoy.taken():
        scene.copy("ours", other.issue("client-other"))
    asking.goes_on()
    until(lambda: issuer(served(scene, path="/last")[1]) == "other")  # over a new connection
    with envoy.taken():
        put(scene.there / "upstream.pem", other.path.read_text())
    asking.goes_on()
    with envoy.taken():
        put(scene.there / "upstream.pem", root + other.path.read_text())
    scene.behind.load_cert_chain(*scene.pki.middle.issue("behind-again", "DNS:behind.test"))
    asking.goes_on()


@takes_long
@pytest.mark.parametrize("way", WAYS)
def test_the_keys_of_tokens(scene: Scene, envoy: EnvoyRun, asking: Load, way: str) -> None:
    old, new = scene.keys
    path = scene.there / "jwks.json"

    def keys(*some: Path) -> str:
        write_jwks(scene.there / "coming.json", *some)
        return (scene.there / "coming.json").read_text()

    with envoy.taken():
        replace(path, keys(old, new), way)
    asking.goes_on()
    scene.token = token(new, aud="web")
    asking.goes_on()
    with envoy.taken():
        replace(path, keys(new), way)
    asking.goes_on()
    client = Client(scene.net, (HOST4, WEB))
    late = {"X-Origin": scene.origin, "Authorization": f"Bearer {token(old, aud='web')}"}
    assert client.get(headers=late, keep=False)[0] == 401
    scene.keys.reverse()

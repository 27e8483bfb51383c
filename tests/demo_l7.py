"""Layer 7 from one file, end to end, in throwaway network namespaces: `make demo-l7`.

Our host has a shop behind a CDN, an office's API for which a certificate is asked, a mail server, and a program that
calls a partner, whose name it asks for. The real `tpctl install`, `tpctl envoy check` and `tpctl envoy run` run on it;
the CDN, strangers, attackers and the partner are on another host. Nothing touches the machine's own network, and
nothing is left.

    python -m tests.demo_l7

Exits with 0 only if each of them met what the file says.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.demo import print_table
from tests.netns.envoy.application import answer_http, greet, over_tls, serving
from tests.netns.envoy.scene import Answer, curl, exchange, headers
from tests.netns.envoy_process.plant import TRANSPORTS, EnvoyRun, asked, put, running
from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki, server_context
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, RELAY_USER, Net, for_the_relay
from tests.unit.envoy.examples import new_key, token, write_jwks

SHOP, OFFICE, MAIL, OTHER, PARTNER = 8080, 8443, 25, 9000, 8090
STRANGER = {4: "10.99.0.66", 6: "fd99::66"}
CDN = {4: PEER4, 6: PEER6}
HOST = {4: HOST4, 6: HOST6}
CLIENT = {4: "203.0.113.9", 6: "2001:db8::9"}
FILE = """
secrets:
  origin:          {{file: {there}/origin}}
  origin-previous: {{file: {there}/origin.previous}}
  partner:         {{file: {there}/partner}}
trusted_ips: [10.99.0.1, "fd99::1"]                # the CDN
dns: {{zone_file: {there}/names}}
listeners:
  - listen: "[::]:15006 ipv6only=off"
    direction: inbound
    services:
      - name: shop
        port: 8080
        protocol: http
        origin_verify: {{header: X-Origin-Verify, secrets: [origin, origin-previous]}}
        jwt:
          issuer: https://login.example
          audiences: [shop]
          jwks_file: {there}/jwks.json
          claims_to_headers: {{sub: X-Subject}}
        rate_limit: {{requests: 8, per: 1h}}
        real_ip_header: X-Real-IP
      - name: office
        port: 8443
        protocol: http
        ssl:
          certificate: {there}/server.pem
          certificate_key: {there}/server.key
          client_ca_file: {there}/root.pem
      - {{name: mail, port: 25, access: {{deny: [10.99.0.66, "fd99::66"]}}}}
  - listen: "[::]:15001 ipv6only=off"
    direction: outbound
    services:
      - name: partner
        port: 8090
        protocol: http
        inject_headers: {{X-Api-Key: {{secret: partner}}}}
        upstream_tls:
          ca_file: {there}/root.pem
          server_name: server.test
          certificate: {there}/client.pem
          certificate_key: {there}/client.key
  - listen: "[::]:15053 ipv6only=off"
    direction: dns
"""


@dataclass(frozen=True)
class Row:
    """Somebody's attempt, what should come of it, and what did."""

    who: str
    expected: str
    found: str

    @property
    def held(self) -> bool:
        """Whether it came as it should."""
        return self.expected == self.found


@dataclass(frozen=True)
class Stage:
    """Our host, and what the attempts need."""

    net: Net
    folder: Path
    pki: Pki
    run: EnvoyRun

    def shop(self, family: int, *given: str, source: str, bearer: str | None = None) -> Answer:
        """A request to the shop."""
        more = (f"Authorization: Bearer {bearer}",) if bearer else ()
        return curl(self.net, self.net.peer, HOST[family], SHOP, *headers(*given, *more), source=source)

    def user(self, **claims: Any) -> str:
        """The token of a user."""
        return token(self.folder / "jwt.key", **{"iss": "https://login.example", "aud": "shop", **claims})


def _status(answer: Answer) -> str:
    return str(answer.status) if answer.status else "refused"


def shop_rows(stage: Stage, family: int) -> Iterator[Row]:
    """Only the CDN, with its secret, and users with a token."""
    client, user = CLIENT[family], stage.user()
    secret, forwarded = "X-Origin-Verify: now-valid", f"X-Forwarded-For: {client}"

    def by_cdn(*given: str, bearer: str | None = user) -> str:
        return _status(stage.shop(family, forwarded, *given, source=CDN[family], bearer=bearer))

    good = stage.shop(family, secret, forwarded, "X-Subject: root", source=CDN[family], bearer=user)
    told = _status(good)
    if good.status == 200:
        told += f", for {good.asked.header('x-subject')} at {good.asked.header('x-real-ip')}"
    yield Row("the CDN, with its secret, for a user with a token", f"200, for ['alice'] at ['{client}']", told)
    yield Row("the same with the previous secret", "200", by_cdn("X-Origin-Verify: still-valid"))
    yield Row("without the secret", "403", by_cdn())
    yield Row("without a token", "401", by_cdn(secret, bearer=None))
    yield Row("with one that has expired", "401", by_cdn(secret, bearer=stage.user(expires=-3600)))
    yield Row("with one for another service", "403", by_cdn(secret, bearer=stage.user(aud="another")))
    stranger = stage.shop(family, "X-Origin-Verify: guessed", forwarded, source=STRANGER[family], bearer=user)
    yield Row("a stranger that calls itself a user of the CDN", "403", _status(stranger))
    busy = [by_cdn(secret) for _ in range(9)]
    yield Row("a user that asks too often", "429", busy[-1])


def other_rows(stage: Stage, family: int) -> Iterator[Row]:
    """The office's API, the mail server, a port without a service, the partner."""
    net, host = stage.net, HOST[family]
    own = ("--cert", str(stage.pki.client[0]), "--key", str(stage.pki.client[1]))
    trust = ("--cacert", str(stage.pki.root.path), "--connect-to", f"server.test:{OFFICE}:[{host}]:{OFFICE}")
    office = curl(net, net.peer, "server.test", OFFICE, *trust, *own, scheme="https")
    shown = office.asked.header("x-forwarded-client-cert") if office.status == 200 else []
    yield Row("the office, with a certificate", "200, the API knows whose", f"{_status(office)}, the API knows whose"
              if 'CN=client' in str(shown) else _status(office))  # fmt: skip
    without = curl(net, net.peer, "server.test", OFFICE, *trust, scheme="https")
    yield Row("somebody without one", "refused", _status(without))
    yield Row("somebody without TLS", "refused", _status(curl(net, net.peer, host, OFFICE)))
    for source, who, expected in ((CDN, "a mail client", "220 hello"), (STRANGER, "one that is denied", "refused")):
        said = _first_words(net, host, source[family])
        yield Row(f"{who}, before it says anything", expected, said or "refused")
    yield Row("a port without a service", "200", _status(curl(net, net.peer, host, OTHER)))
    partner = curl(net, net.host, CDN[family], PARTNER)
    seen = partner.asked if partner.status == 200 else None
    told = f"{seen['client_certificate']['commonName']}, {seen.header('x-api-key')[0]}" if seen else _status(partner)
    yield Row("our program calls a partner, who sees over TLS", "client, partner-key", told)
    for how in TRANSPORTS:
        addresses = asked(net, "partner.mesh", how, (CDN[family], 53))
        yield Row(f"its name, asked for over {how}", PEER4, ", ".join(addresses) or "no answer")
    for port in (15006, 15001):
        with contextlib.suppress(OSError):
            exchange(net, net.peer, (host, port), b"x")
    yield Row("an attacker calls Envoy's own ports", "Envoy lives", "Envoy lives" if _lives(stage) else "Envoy died")


def _first_words(net: Net, host: str, source: str) -> str:
    with net.connect(net.peer, (host, MAIL), source) as client, contextlib.suppress(ConnectionError):
        return client.recv(100).decode().strip()
    return ""


def _lives(stage: Stage) -> bool:
    return curl(stage.net, stage.net.peer, HOST4, OTHER).status == 200 and Path(f"/proc/{stage.run.envoy()}").exists()


def rotation_rows(stage: Stage) -> Iterator[Row]:
    """A new secret, without a restart."""
    with stage.run.taken():
        put(stage.folder / "origin", "brand-new")
    user = stage.user(sub="bob")

    def attempt(secret: str) -> str:
        given = (f"X-Origin-Verify: {secret}", "X-Forwarded-For: 203.0.113.77")
        return _status(stage.shop(4, *given, source=CDN[4], bearer=user))

    yield Row("the CDN's new secret, after its file was replaced", "200", attempt("brand-new"))
    yield Row("the one before it", "403", attempt("now-valid"))


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Namespaces, files, servers, and Envoy behind an installed policy."""
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(relay_net.network(redirect=False, passthrough6=False))
        net.add_address(net.peer, f"{STRANGER[4]}/24")
        net.add_address(net.peer, f"{STRANGER[6]}/64", "eth0", "preferred_lft", "0")
        pki = Pki(folder)
        for name, value in (("origin", "now-valid"), ("origin.previous", "still-valid"), ("partner", "partner-key")):
            (folder / name).write_text(value)
            for_the_relay(folder / name)
        write_jwks(folder / "jwks.json", new_key(folder / "jwt.key"))
        for port, serve in ((SHOP, answer_http), (OFFICE, answer_http), (MAIL, greet), (OTHER, answer_http)):
            stack.enter_context(serving(net, net.host, port, serve))
        context = server_context(pki.server)
        context.load_verify_locations(pki.root.path)
        context.verify_mode = 2  # type: ignore[assignment]  # CERT_REQUIRED
        stack.enter_context(serving(net, net.peer, PARTNER, over_tls(context, answer_http)))
        (folder / "names").write_text(f"{PEER4} partner.mesh\n")
        file = folder / "envoy.yaml"
        file.write_text(FILE.format(there=folder))
        dns = ("--redirect-all-dns-traffic", "--redirect-dns-tcp")
        _say(net, "install", "--kuma-dp-user", RELAY_USER, *dns, "--no-probe")
        _say(net, "envoy", "check", str(file))
        print(f"$ tpctl envoy run {file} --user {RELAY_USER}\n")
        run = stack.enter_context(running(net, folder, file.read_text()))
        yield Stage(net, folder, pki, run)


def _say(net: Net, *arguments: str) -> None:
    """Run a command on our host and show it."""
    print(f"$ tpctl {' '.join(arguments)}")
    print(net.on_host(sys.executable, "-m", "tpctl.cli.main", *arguments).rstrip())


def demonstrate() -> bool:
    """The whole story; whether all of it held."""
    kinds: Sequence[Callable[[Stage, int], Iterator[Row]]] = (shop_rows, other_rows)
    with relay_net.public_directory() as folder, staged(folder) as stage:
        table = [["", "who", "should be", "was", ""]]
        rows = [(f"IPv{family}", row) for kind in kinds for family in (4, 6) for row in kind(stage, family)]
        rows += [("IPv4", row) for row in rotation_rows(stage)]
    table += [[where, row.who, row.expected, row.found, "ok" if row.held else "WRONG"] for where, row in rows]
    print_table(table)
    wrong = sum(not row.held for _, row in rows)
    print(f"\n{'everything held' if not wrong else f'{wrong} WRONG'}: {len(rows)} attempts")
    return not wrong


if __name__ == "__main__":
    sys.exit(0 if demonstrate() else 1)

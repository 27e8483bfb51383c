"""Real programs through the relay under redirection: OpenSSH, PostgreSQL, nginx, curl, OpenSSL.

dig and dnsmasq are in test_dns_peers.py, HAProxy on both sides of the PROXY protocol in
test_proxy_protocol.py, Envoy in ../test_envoy.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hidden import hide
from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki
from tests.netns.relay.net import HOST4, PEER4, PEER6, RELAY_USER, Net, Relay

pytestmark = pytest.mark.root
PATIENCE = relay_net.PATIENCE
SIZE = 5_000_000
SSHD = """\
Port 2222
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
NGINX = """\
daemon off;
user root;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_max_body_size 10m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 80;
        listen [::]:80;
        root {folder}/files;
        location = /who {{ return 200 "$remote_addr"; }}
    }}
}}
"""


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if program_path(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")


def program_path(name: str) -> str | None:
    """Debian keeps PostgreSQL's server programs out of the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(debian[-1]) if debian else shutil.which(name)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with relay_net.public_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with relay_net.network() as made:
        yield made


@pytest.fixture(scope="module")
def running(net: Net, folder: Path) -> Iterator[Relay]:
    with relay_net.relay(net, folder, "--access-log") as relay:
        yield relay


def inside(name: str, *argv: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{name}", *argv]


def run(name: str, *argv: str, stdin: bytes | None = None) -> bytes:
    """What a program in a namespace prints; it must succeed."""
    done = subprocess.run(inside(name, *argv), input=stdin, capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


@contextlib.contextmanager
def serving(net: Net, name: str, address: tuple[str, int], *argv: str) -> Iterator[None]:
    """A server program, from when it listens to its end."""
    log = subprocess.PIPE
    process = subprocess.Popen(inside(name, *argv), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
    assert process.stderr is not None
    try:
        end = time.monotonic() + PATIENCE
        while not listens(net, name, address[1]):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < end, f"{argv[0]} does not listen"
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def listens(net: Net, name: str, port: int) -> bool:
    """Whether anybody listens there, asked without a connection, which would be redirected."""
    found = subprocess.run(inside(name, "ss", "-Hltn", f"sport = :{port}"), capture_output=True, text=True, check=True)
    return bool(found.stdout.strip())


def passed(running: Relay, role: str, destination: str) -> None:
    """The relay has had a connection to that destination."""
    running.wait_for("connection", role=role, destination=destination, reason="closed")


@needs("sshd", "ssh", "ssh-keygen")
def test_openssh(net: Net, running: Relay, folder: Path) -> None:
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    server = f'set -e; mount --make-rprivate /\n{hide("/run")}\nmkdir /run/sshd; exec "$0" -D -e -f "$1"'
    argv = ("unshare", "--mount", "sh", "-c", server, shutil.which("sshd") or "", str(folder / "sshd_config"))
    options = "StrictHostKeyChecking=no UserKnownHostsFile=/dev/null LogLevel=ERROR BatchMode=yes ConnectTimeout=60"
    ssh = ["ssh", "-i", str(folder / "key"), "-p", "2222", *(f"-o{one}" for one in options.split()), f"root@{HOST4}"]
    with serving(net, net.host, (HOST4, 2222), *argv):
        assert run(net.peer, *ssh, "echo $SSH_CLIENT").split()[0] == b"127.0.0.6", "through the relay"
        sent = relay_net.pattern(SIZE)
        digest = run(net.peer, *ssh, "sha256sum", stdin=sent).split()[0].decode()
        assert digest == hashlib.sha256(sent).hexdigest()
        assert run(net.peer, *ssh, "cat", stdin=sent) == sent
        interactive = subprocess.Popen(
            inside(net.peer, *ssh[:1], "-tt", *ssh[1:], "stty -echo; echo ready; cat"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with interactive:
            assert interactive.stdin is not None
            assert interactive.stdout is not None
            assert interactive.stdout.readline() == b"ready\r\n"
            for word in (b"one", b"two", b"three"):
                interactive.stdin.write(word + b"\n")
                interactive.stdin.flush()
                assert interactive.stdout.readline() == word + b"\r\n"
            interactive.stdin.write(b"\x04")
            interactive.stdin.close()
            assert interactive.wait(PATIENCE) == 0
    passed(running, "inbound", f"{HOST4}:2222")


@needs("initdb", "postgres", "psql", "setpriv")
def test_postgresql(net: Net, running: Relay, folder: Path) -> None:
    data, user = folder / "data", ["setpriv", "--reuid", RELAY_USER, "--regid", "nogroup", "--clear-groups"]
    data.mkdir()
    shutil.chown(data, RELAY_USER)
    postgres, initdb = program_path("postgres") or "", program_path("initdb") or ""
    subprocess.run(
        [*user, initdb, "-D", data, "-U", "tester", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"],
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=300,
        cwd=folder,
    )
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 0.0.0.0/0 trust\n")
    server = [*user, postgres, "-D", str(data), "-k", "", "-h", PEER4, "-p", "5432", "-c", "fsync=off"]
    psql = ["psql", "-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-h", PEER4, "-U", "tester", "-d", "postgres"]
    with serving(net, net.peer, (PEER4, 5432), *server):
        assert run(net.host, *psql, "-c", "SELECT 6 * 7") == b"42\n"
        rows = b"".join(b"%d\t%s\n" % (number, b"x" * 400) for number in range(5000))
        loads = b"CREATE TABLE t (n int, x text);\nCOPY t FROM STDIN;\n" + rows + b"\\.\n"
        run(net.host, *psql, stdin=loads)
        assert run(net.host, *psql, "-c", "COPY (SELECT * FROM t ORDER BY n) TO STDOUT") == rows
        many = b"".join(b"SELECT %d;\n" % number for number in range(300))
        assert run(net.host, *psql, stdin=many).split() == [b"%d" % number for number in range(300)]
    passed(running, "outbound", f"{PEER4}:5432")


@needs("nginx", "curl")
def test_nginx_and_curl(net: Net, running: Relay, folder: Path) -> None:
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
    (folder / "files").mkdir()
    content = relay_net.pattern(SIZE)
    (folder / "files" / "large").write_bytes(content)
    curl = ["curl", "-sS", "--fail", "--noproxy", "*", "--max-time", "120"]
    server = [shutil.which("nginx") or "", "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    with serving(net, net.peer, (PEER4, 80), *server):
        assert run(net.host, *curl, f"http://{PEER4}/large") == content
        assert run(net.host, *curl, f"http://[{PEER6}]/large", f"http://[{PEER6}]/who").endswith(b"fd99::2")
        several = run(net.host, *curl, *[f"http://{PEER4}/who"] * 50, "-w", "/%{num_connects} ")
        assert several == b"10.99.0.2/1 " + b"10.99.0.2/0 " * 49, "one connection, kept alive"
        ranged = run(net.host, *curl, "-r", "1000000-1999999", f"http://{PEER4}/large")
        assert ranged == content[1_000_000:2_000_000]
    passed(running, "outbound", f"{PEER4}:80")
    passed(running, "outbound", f"[{PEER6}]:80")


@needs("openssl", "curl")
def test_a_tls_server(net: Net, running: Relay, folder: Path) -> None:
    """TLS from end to end: the relay passes it on as it is."""
    (folder / "pki").mkdir()
    pki = Pki(folder / "pki")
    certificate, key = map(str, pki.server)
    files = ["-cert", certificate, "-cert_chain", certificate, "-key", key]
    server = ["openssl", "s_server", "-accept", "443", "-quiet", "-WWW", *files]
    content = relay_net.pattern(SIZE)
    (folder / "page").write_bytes(content)
    curl = ["curl", "-sS", "--max-time", "120", "--noproxy", "*", "--http0.9", "--cacert", str(pki.root.path)]
    script = f'cd {folder} && exec "$@"'
    with serving(net, net.peer, (PEER4, 443), "sh", "-c", script, "sh", *server):
        answer = run(net.host, *curl, "--resolve", f"server.test:443:{PEER4}", "https://server.test/page")
        assert answer == content
        told = run(net.host, "openssl", "s_client", "-quiet", "-verify_return_error", "-CAfile", str(pki.root.path),
                   "-servername", "server.test", "-verify_hostname", "server.test", "-connect", f"{PEER4}:443",
                   stdin=b"GET /page HTTP/1.0\r\n\r\n")  # fmt: skip
        assert told.endswith(content)
    passed(running, "outbound", f"{PEER4}:443")

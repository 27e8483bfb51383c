"""Kuma's Dataplane resource as a source of configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpctl.config.effective import Config
from tpctl.config.load import load
from tpctl.system.errors import InputError

UNIVERSAL = """\
type: Dataplane
mesh: default
name: {{ name }}
networking:
  address: {{ address }}
  inbound:
    - port: 8080
      servicePort: 80
      tags: {kuma.io/service: web}
    - port: {{{port}}}
      tags: {kuma.io/service: admin}
  transparentProxying:
    redirectPortInbound: 16006
    redirectPortOutbound: 16001
    ipFamilyMode: IPv4
    reachableServices: [redis, elastic]
"""
KUBERNETES = """\
apiVersion: kuma.io/v1alpha1
kind: Dataplane
metadata: {name: web}
spec:
  networking:
    inbound: [{port: 8080}]
    transparentProxying: {redirectPortInbound: 15006, redirectPortOutbound: 15001}
"""
GATEWAY = """\
type: Dataplane
networking:
  gateway: {type: DELEGATED, tags: {kuma.io/service: edge}}
  transparentProxying: {redirectPortInbound: 0, redirectPortOutbound: 15001}
"""
VARIABLES = ["name=web", "address=10.0.0.5", "port=9090"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dp.yaml"
    path.write_text(UNIVERSAL)
    return path


def config(path: Path, **flags: str) -> Config:
    given = {name: [value] for name, value in flags.items()}
    return load(flags={"dataplane_file": [str(path)], "dataplane_variables": VARIABLES, **given})


def problems(path: Path, **flags: str) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        config(path, **flags)
    return caught.value.problems


def test_ports_family_and_inbound_are_used(file: Path) -> None:
    found = config(file)
    assert (found.inbound_port, found.outbound_port, found.ip_family_mode) == (16006, 16001, "ipv4")
    assert [str(port) for port in found.inbound_include_ports] == ["8080", "9090"]
    assert found.origin("inbound_port") == f"dataplane {file}: networking.transparentProxying.redirectPortInbound"


def test_the_form_of_kubernetes(file: Path) -> None:
    file.write_text(KUBERNETES)
    assert [str(port) for port in config(file).inbound_include_ports] == ["8080"]


def test_a_gateway_takes_no_inbound_traffic(file: Path) -> None:
    file.write_text(GATEWAY)
    found = config(file)
    assert not found.inbound_enabled
    assert found.inbound_port == 15006
    (problem,) = problems(file, inbound_enabled="true")
    assert problem.startswith("flag --redirect-inbound: true contradicts dataplane")


@pytest.mark.parametrize(
    "flags",
    [
        {"inbound_port": "16006", "outbound_port": "16001", "ip_family_mode": "ipv4", "inbound_enabled": "true"},
        {"inbound_include_ports": "1-65535"},
        {"inbound_exclude_ports": "22"},
    ],
)
def test_what_agrees_is_fine(file: Path, flags: dict[str, str]) -> None:
    assert config(file, **flags).inbound_port == 16006


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"inbound_port": "15006"}, "flag --redirect-inbound-port: 15006 contradicts dataplane"),
        ({"outbound_port": "15001"}, "flag --redirect-outbound-port: 15001 contradicts"),
        ({"ip_family_mode": "dualstack"}, "flag --ip-family-mode: dualstack contradicts"),
        ({"inbound_exclude_ports": "9000-9100"}, "flag --exclude-inbound-ports has port 9090"),
        ({"inbound_include_ports": "8080"}, "flag --include-inbound-ports leaves out port 9090"),
        ({"inbound_enabled": "false"}, "flag --redirect-inbound: false contradicts"),
    ],
)
def test_contradictions_are_errors(file: Path, flags: dict[str, str], said: str) -> None:
    (problem,) = problems(file, **flags)
    assert problem.startswith(said)


def test_contradictions_with_files_and_the_environment(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "config.yaml"
    other.write_text(f"dataplaneFile: {file}\ndataplaneVar: {{name: a, address: b, port: 1}}\n"
                     "redirect: {outbound: {port: 1}}\n")  # fmt: skip
    with pytest.raises(InputError) as caught:
        load(files=[str(other)], environ={"TPCTL_REDIRECT_INBOUND_PORT": "2"})
    assert len(caught.value.problems) == 2
    assert all("contradicts dataplane" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("type: Mesh\n", "is not a Dataplane resource"),
        ("- a\n", "is not a Dataplane resource"),
        ("type: Dataplane\nnetworking: 5\n", "is not a Dataplane resource"),
        ("type: Dataplane\nnetworking: {inbound: {port: 80}}\n", "is not a list"),
        ("type: Dataplane\nnetworking: {inbound: [{port: 0}]}\n", "networking.inbound[0].port: 0 is not a port"),
        (
            "type: Dataplane\nnetworking: {inbound: [80]}\n",
            "networking.inbound[0]: 80 is a value where keys are expected",
        ),
        ("type: Dataplane\nnetworking: {transparentProxying: [x]}\n", "is a value where keys are expected"),
        ("type: Dataplane\nnetworking: {transparentProxying: {ipFamilyMode: IPv6}}\n", "is not one of DualStack, IPv4"),
        ("type: Dataplane\nnetworking: {transparentProxying: {redirectPortInbound: 99999}}\n", "is not a port"),
        (
            "type: Dataplane\nnetworking: {transparentProxying: {redirectPortInboundV6: 15010}}\n",
            "the same port as IPv4",
        ),
        ("type: Dataplane\nname: {{ other }}\n", "variables without a value: other; add --dataplane-var other="),
        ("type: {{#section}}x{{/section}}\n", "variables without a value"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_files_that_cannot_be_used(file: Path, content: str, said: str) -> None:
    file.write_text(content)
    found = problems(file)
    assert any(said in problem for problem in found), found
    assert all(str(file) in problem for problem in found)


def test_variables_alone_and_bad_variables(file: Path) -> None:
    with pytest.raises(InputError, match="no effect without --dataplane-file"):
        load(flags={"dataplane_variables": ["a=b"]})
    with pytest.raises(InputError, match='"name" is not NAME=VALUE'):
        load(flags={"dataplane_file": [str(file)], "dataplane_variables": ["name"]})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "none.yaml")
    assert "none.yaml: cannot be read: No such file" in problem

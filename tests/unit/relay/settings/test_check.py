"""The services of a Dataplane, times, trees of any shape, and checking the relay's configuration file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.relay.settings.examples import FULL, assert_problems, settings
from tpctl.cli.commands.relay import command
from tpctl.config.values import BadValueError
from tpctl.relay.settings import section as config_section
from tpctl.relay.settings.file import load, settings_of
from tpctl.relay.settings.flags import Flags
from tpctl.relay.settings.model import ServicePorts, Settings
from tpctl.system.errors import InputError

DATAPLANE = """
type: Dataplane
networking:
  address: 10.0.0.2
  inbound:
    - {port: 8080, servicePort: 80}
    - {port: 9090, serviceAddress: 127.0.0.1}
    - {port: "{{ port }}", servicePort: 6, serviceAddress: "::1"}
"""


def test_the_services_of_a_dataplane(tmp_path: Path) -> None:
    (tmp_path / "dp.yaml").write_text(DATAPLANE)
    text = f"""
listeners:
  - listen: "*:15006"
    direction: inbound
    upstream: dataplane
    dataplane_file: {tmp_path}/dp.yaml
    dataplane_variables: {{port: 7070}}
"""
    expected = {8080: (None, 80), 9090: ("127.0.0.1", 9090), 7070: ("::1", 6)}
    assert settings(text).listeners[0].upstream == ServicePorts(expected, tmp_path / "dp.yaml")


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        (DATAPLANE, "", "has variables without a value: port"),
        ("type: Mesh", "", "is not a Dataplane resource"),
        (None, "", "cannot be read"),
        (DATAPLANE, ", dataplane_variables: {port: x}", ': networking.inbound[2]: "x" is not a port'),
    ],
)
def test_a_dataplane_that_cannot_be_used(tmp_path: Path, content: str | None, options: str, problem: str) -> None:
    path = tmp_path / "dp.yaml"
    if content:
        path.write_text(content)
    listener = f'{{listen: "*:15006", direction: inbound, upstream: dataplane, dataplane_file: {path}{options}}}'
    place = f"file r.yaml: listeners[0].dataplane_file: {path}"
    with pytest.raises(InputError) as raised:
        settings(f"listeners: [{listener}]")
    assert [line.startswith(place) and problem in line for line in raised.value.problems] == [True]


def test_a_file_that_is_not_there() -> None:
    assert_problems(lambda: load("/nonexistent/relay.yaml"), ["file /nonexistent/relay.yaml: cannot be read"])


@pytest.mark.parametrize(
    ("value", "seconds"), [(30, 30.0), (0.5, 0.5), ("30", 30.0), ("500ms", 0.5), ("1h30m", 5400.0), (0, 0.0)]
)
def test_times(value: object, seconds: float) -> None:
    assert config_section.seconds(value) == seconds


@pytest.mark.parametrize("value", [-1, "soon", "", float("nan"), float("inf"), True, None, "-1s"])
def test_what_is_no_time(value: object) -> None:
    with pytest.raises(BadValueError):
        config_section.seconds(value)


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["listeners", "listen", "direction", "access", "allow", "ssl", "timeouts", "limits", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(yaml_values)
def test_no_tree_breaks_the_reader(tree: object) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(settings_of(tree, "r.yaml"), Settings)


def test_checking_a_configuration(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    text = FULL.replace("user: kuma-dp", "user: nobody")  # who is on every host
    good.write_text(text)
    bad.write_text(text.replace("direction: dns", "direction: dsn"))
    result = CliRunner().invoke(command, ["--config", str(good), "--check-config"], standalone_mode=False)
    assert (result.return_value, result.output) == (0, f"{good}: valid, 3 listeners\n")
    result = CliRunner().invoke(command, ["--config", str(bad), "--check-config"])
    assert isinstance(result.exception, InputError)
    assert CliRunner().invoke(command, ["--check-config"], standalone_mode=False).return_value == 0


def test_of_a_file_for_envoy_the_listeners_for_dns_alone(tmp_path: Path) -> None:
    path = tmp_path / "envoy.yaml"
    inbound = "{listen: '*:15006', direction: inbound, services: [{port: 80, protocol: http}]}"
    path.write_text(f"user: nobody\nlisteners: [{inbound}, {{listen: '*:15053', direction: dns}}]")
    only = ["--config", str(path), "--only", "dns", "--check-config"]
    result = CliRunner().invoke(command, only, standalone_mode=False)
    assert (result.return_value, result.output) == (0, f"{path}: valid, 1 listeners\n")
    assert isinstance(CliRunner().invoke(command, ["--config", str(path), "--check-config"]).exception, InputError)
    path.write_text(f"listeners: [{inbound}]")
    said = CliRunner().invoke(command, only).exception
    assert str(said) == f"--only dns: file {path} has no listener with direction: dns"
    said = CliRunner().invoke(command, ["--only", "dns"]).exception
    assert str(said) == "--only dns: needs --config, the file of whose listeners it serves some"
    path.write_text("listeners: [{listen: '*:15053', direction: dns, limits: {connections: 3}}]")
    said = CliRunner().invoke(command, only).exception
    assert str(said) == f"file {path}: listeners[0].limits: has no meaning for DNS; leave it out"


def test_flags_that_belong_into_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(FULL)
    arguments = ["--config", str(tmp_path / "r.yaml"), "--inbound-port", "1", "--workers", "3", "--dns-zone", "x"]
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, InputError)
    assert [line.split(":")[0] for line in result.exception.problems] == ["--dns-zone", "--inbound-port"]
    arguments = ["--config", str(tmp_path / "r.yaml"), "--workers", "0", "--check-config"]
    assert isinstance(CliRunner().invoke(command, arguments).exception, InputError)


def test_as_many_workers_as_processors(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("workers: auto\nlisteners: [{listen: '*:1', direction: outbound}]")
    assert load(str(tmp_path / "r.yaml")).workers == len(os.sched_getaffinity(0))
    (tmp_path / "one.yaml").write_text("listeners: [{listen: '*:1', direction: outbound}]")
    assert load(str(tmp_path / "one.yaml")).workers == 1
    started = CliRunner().invoke(command, ["--workers", "auto", "--check-config"], standalone_mode=False)
    assert started.return_value == 0, started.output
    assert CliRunner().invoke(command, ["--workers", "some", "--check-config"]).exit_code == 2


def test_acceleration_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    text = "listeners: [{listen: '*:1', direction: outbound}]\n"
    found = []
    for line in ("", "accelerate: off", "accelerate: sockmap"):
        (tmp_path / "r.yaml").write_text(text + line)
        found.append(load(str(tmp_path / "r.yaml")).accelerate)
    assert found == ["off", "off", "sockmap"]
    assert Flags().settings().accelerate == "off"
    (tmp_path / "r.yaml").write_text(text + "accelerate: xdp")
    with pytest.raises(InputError, match=r"accelerate: .xdp. is not one of off, sockmap"):
        load(str(tmp_path / "r.yaml"))

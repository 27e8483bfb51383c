"""What a relay's file asks for and cannot get is said, rather than left out in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tpctl.cli.commands.relay import command
from tpctl.config.values import BadValueError
from tpctl.config.yaml_text import parse_yaml
from tpctl.relay.dns.zone_file import parse_yaml_zone
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.file import settings_of
from tpctl.relay.settings.listen import read_address
from tpctl.system.errors import InputError


def problems_of(text: str) -> list[str]:
    with pytest.raises(InputError) as raised:
        settings_of(parse_yaml(text), "r.yaml")
    return list(raised.value.problems)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limits", "{connections: 3}"),
        ("timeouts", "{idle: 3s}"),
        ("source", "client"),
        ("allow_metadata_addresses", "true"),
        ("trusted_ips", "[10.0.0.0/8]"),
    ],
)
def test_what_means_nothing_for_dns(key: str, value: str) -> None:
    said = problems_of(f"listeners: [{{listen: '*:15053', direction: dns, {key}: {value}}}]")
    assert said == [f"file r.yaml: listeners[0].{key}: has no meaning for DNS; leave it out"]


def test_what_holds_for_all_listeners_may_stand_beside_dns() -> None:
    text = "trusted_ips: [10.0.0.0/8]\ntimeouts: {idle: 3s}\nlisteners: [{listen: '*:15053', direction: dns}]"
    assert settings_of(parse_yaml(text), "r.yaml").listeners[0].timeouts.idle == 3


@pytest.mark.parametrize("upstream", ["*:80", "0.0.0.0:80", "[::]:80"])
def test_no_upstream_is_every_address(upstream: str) -> None:
    (said,) = problems_of(f"listeners: [{{listen: '*:15006', direction: inbound, upstream: '{upstream}'}}]")
    assert said.startswith("file r.yaml: listeners[0].upstream: ")
    assert upstream in said
    assert "name one, as in 127.0.0.1:80" in said


@pytest.mark.parametrize("key", ["listen", "upstream", "metrics"])
def test_an_ipv4_address_is_written_as_one(key: str) -> None:
    listener = {"listen": "'*:15006'", "direction": "inbound"} | ({key: "'[::ffff:10.0.0.1]:80'"})
    top = "metrics: '[::ffff:10.0.0.1]:80'\n" if listener.pop("metrics", None) else ""
    inner = ", ".join(f"{name}: {value}" for name, value in listener.items())
    (said,) = problems_of(f"{top}listeners: [{{{inner}}}]")
    assert '"[::ffff:10.0.0.1]:80"' in said
    assert "write 10.0.0.1:80" in said or key == "upstream"


def test_addresses_that_are_almost_mapped_are_their_own() -> None:
    assert read_address("[::1:ffff:a00:1]:80") == Destination("::1:ffff:a00:1", 80, 10)


def test_upstreams_of_a_zone_are_dialled_in_their_own_family() -> None:
    zone = parse_yaml_zone("names: {a.mesh: {addresses: 240.0.0.1, upstreams: '::ffff:10.0.0.1'}}", "mesh")
    assert zone.vips.upstreams(Destination("240.0.0.1", 80)) == (Destination("10.0.0.1", 80),)
    with pytest.raises(BadValueError, match=r"0\.0\.0\.0"):
        parse_yaml_zone("names: {a.mesh: {addresses: 240.0.0.1, upstreams: '0.0.0.0:80'}}", "mesh")


def test_a_user_that_does_not_exist_is_named_with_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("user: no-such-user\nlisteners: [{listen: '*:1', direction: outbound}]")
    for arguments, place in (
        (["--config", str(path)], f"file {path}: user: "),
        (["--config", str(path), "--user", "nor-this-one"], "--user: "),
        (["--user", "nor-this-one"], "--user: "),
    ):
        result = CliRunner().invoke(command, [*arguments, "--check-config"])
        assert isinstance(result.exception, InputError)
        (said,) = result.exception.problems
        assert said.startswith(f"{place}there is no user 'n"), said


@pytest.mark.parametrize("role", ["inbound", "outbound"])
def test_a_port_beside_an_address_that_names_one(role: str) -> None:
    arguments = [f"--{role}-listen", "*:1506", "--check-config"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    result = CliRunner().invoke(command, [*arguments, f"--{role}-port", "1507"])
    assert isinstance(result.exception, InputError)
    (said,) = result.exception.problems
    assert said == f"--{role}-port: cannot be combined with --{role}-listen, which names the port"

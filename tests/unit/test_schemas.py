"""The JSON Schemas in docs/schemas: of what is printed, and of configuration files.

`python -m tests.unit.test_schemas` writes docs/schemas/config.json anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import pytest
import yaml

from tests.schemas import FOLDER, schema, validated
from tpctl.cli import main
from tpctl.config import traffic, values
from tpctl.config.load import load
from tpctl.config.options import OPTIONS, Option
from tpctl.system.errors import InputError

CONFIG = FOLDER / "config.json"
CAMEL = re.compile(r"[a-z][A-Za-z]*")
TEXT = {"type": ["string", "integer", "null"]}
TEXTS = {"anyOf": [TEXT, {"type": "array", "items": {"type": ["string", "integer"]}}]}
SCALARS = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
BY_READER: Mapping[object, Mapping[str, Any]] = {
    values.read_bool: {"anyOf": [{"type": ["boolean", "null"]}, {"enum": sorted(values.TRUE | values.FALSE)}]},
    values.read_text: TEXT,
    values.read_user: TEXT,
    values.read_cgroup: {"type": ["string", "null"]},
    values.read_path: {"type": ["string", "null"]},
    values.read_duration: TEXT,
    values.read_executables: {
        "anyOf": [
            {
                "type": "object",
                "properties": {name: {"type": ["string", "null"]} for name in values.EXECUTABLES},
                "additionalProperties": False,
            },
            *TEXTS["anyOf"],
        ]
    },
    values.read_variables: {"anyOf": [SCALARS, *TEXTS["anyOf"]]},
    **dict.fromkeys(
        (
            traffic.read_ports,
            traffic.read_networks,
            traffic.read_uid_exclusions,
            traffic.read_marks,
            traffic.read_virtual_networks,
            traffic.read_interfaces,
        ),
        TEXTS,
    ),
}  # fmt: skip


def config_schema() -> dict[str, Any]:
    """That of a configuration file, made from the table of options."""
    whole = _section("What `tpctl install --config` takes; a key that is null counts as not given.")
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Configuration of tpctl", **whole}
    for option in OPTIONS:
        *sections, last = option.key.split(".")
        here = whole
        for name in sections:
            here = here["properties"].setdefault(name, _section())
        default = "" if option.flag_negates else f" Flag {option.flag}."
        here["properties"][last] = {"description": f"{_meaning(option)}{default}", **_type(option)}
    return whole


def _section(description: str = "") -> dict[str, Any]:
    return {
        **({"description": description} if description else {}),
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {},
    }


def _meaning(option: Option) -> str:
    return f"false is {option.flag}: {option.help}" if option.flag_negates else option.help


def _type(option: Option) -> dict[str, Any]:
    if isinstance(option.read, values.Choice):
        return {"enum": [*option.read.allowed, None]}
    if isinstance(option.read, values.Number):
        return _numbers(option.read.low, option.read.high)
    if option.read is values.read_port:
        return _numbers(1, 65535)
    return dict(BY_READER[option.read])


def _numbers(low: int, high: int) -> dict[str, Any]:
    return {"anyOf": [{"type": "integer", "minimum": low, "maximum": high}, {"type": ["string", "null"]}]}


def _text() -> str:
    return json.dumps(config_schema(), indent=2) + "\n"


def test_the_schema_of_the_configuration_is_that_of_the_code() -> None:
    assert CONFIG.read_text(encoding="utf-8") == _text(), "write it anew: .venv/bin/python -m tests.unit.test_schemas"


def printed(*flags: str) -> str:
    argv = [sys.executable, "-m", "tpctl.cli.main", "install", "--print-config", *flags]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (
            "--redirect-dns", "--exclude-inbound-ports=22,80-90", "--exclude-outbound-ips", "10.0.0.0/8,fd00::/8",
            "--exclude-outbound-ports-for-uids", "tcp:22,80-90:1-2", "--vnet", "br+:fd00::/64", "--ip-family-mode=ipv4",
            "--sleep-between-retries", "1500ms", "--iptables-executables", "iptables:/a", "--kuma-dp-user", "5678",
            "--exclude-interfaces", "wg+", "--exclude-outbound-marks", "0x80000/0xff0000", "--cgroup", "a.slice",
        ),
    ],
    ids=["defaults", "values"],
)  # fmt: skip
def test_what_print_config_prints_is_a_configuration(flags: tuple[str, ...]) -> None:
    jsonschema.validate(yaml.safe_load(printed(*flags)), schema("config.json"))


@pytest.mark.parametrize(
    "text",
    [
        "redirect: {inbound: {prot: 1}}", "redirect: {inbound: {port: 70000}}", "redirect: {inbound: {enabled: 5}}",
        "engine: fast", "redirect: 1", "log: {level: 9}", "iptablesExecutables: {iptable: /a}", "a: 1",
    ],
)  # fmt: skip
def test_what_tpctl_refuses_an_editor_marks(text: str, tmp_path: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        load(files=[str(path)])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), schema("config.json"))


@pytest.mark.parametrize(
    "text",
    [
        "redirect: {inbound: {port: '15006', excludePorts: '22,80-90', includePorts: [1, '2-3'], excludePortsForIPs: "
        "10.0.0.0/8}, outbound: null}", "redirect: {dns: {enabled: 'true', captureAll: no}}", "kumaDPUser: 5678",
        "retry: {sleepBetweenRetries: 2000000000}", "dataplaneVar: {address: 10.0.0.1}\ndataplaneFile: null",
    ],
)  # fmt: skip
def test_what_tpctl_takes_an_editor_leaves_alone(text: str, tmp_path: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    if "dataplaneVar" not in text:
        load(files=[str(path)])
    jsonschema.validate(yaml.safe_load(text), schema("config.json"))


def keys(tree: object) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for name, below in tree.items():
            if name == "properties":
                yield from below
            yield from keys(below)
    elif isinstance(tree, list):
        for below in tree:
            yield from keys(below)


def test_every_name_is_in_camel_case() -> None:
    assert [name for name in keys(schema("output.json")) if not CAMEL.fullmatch(name)] == []


def test_a_document_of_every_command_that_takes_json() -> None:
    described = {one["$ref"].rpartition("/")[2] for one in schema("output.json")["oneOf"]}
    import click

    for name in main.COMMANDS:
        command = main.tpctl.get_command(click.Context(main.tpctl), name)
        assert command is not None
        below = list(command.commands.values()) if isinstance(command, click.Group) else []
        if any("--json" in parameter.opts for one in (command, *below) for parameter in one.params):
            assert name.capitalize() in described, name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("install", "--json", "--wait", "x", "--redirect-dns-port", "0"), "is not a port"),
        (("status", "--json", "--no-such-flag"), "No such option"),
        (("instal", "--json"), "Did you mean 'install'?"),
        (("explain", "outbound", "--json", "--to", "x", "--kuma-dp-user", "0"), "is no ADDRESS:PORT"),
        (("top", "--json", "--config", "/nonexistent"), "/nonexistent"),
    ],
    ids=str,
)
def test_errors_are_told_as_json_too(words: tuple[str, ...], said: str) -> None:
    argv = [sys.executable, "-m", "tpctl.cli.main", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env={**os.environ})
    found = validated(done.stdout)
    assert (found["kind"], found["exitCode"], done.returncode) == ("Error", 2, 2)
    assert "".join(f"error: {problem}\n" for problem in found["problems"]) == done.stderr
    assert said in done.stderr


if __name__ == "__main__":
    CONFIG.write_text(_text(), encoding="utf-8")

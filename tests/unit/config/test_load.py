"""Sources of configuration, their precedence, and that everything wrong is reported in one go."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpctl.config.effective import Config
from tpctl.config.load import load
from tpctl.config.options import OPTIONS
from tpctl.config.unsupported import UNSUPPORTED, Unsupported
from tpctl.spec.policy import PortRange
from tpctl.system.errors import InputError

NOBODY = 65534
WriteYaml = Callable[[str], str]


@pytest.fixture
def yaml_file(tmp_path: Path) -> WriteYaml:
    """Writes a file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text)
        return str(path)

    return write


def problems(**sources: object) -> tuple[str, ...]:
    """What `load` objects to."""
    with pytest.raises(InputError) as caught:
        load(**sources)  # type: ignore[arg-type]
    return caught.value.problems


def test_the_table_and_the_config_have_the_same_attributes() -> None:
    fields = set(Config._fields) - {"origins", "notices"}
    assert fields == {option.name for option in OPTIONS}


@pytest.mark.parametrize("attribute", ["name", "key", "flag", "variable"])
def test_the_table_is_unambiguous(attribute: str) -> None:
    values = [getattr(option, attribute) for option in OPTIONS]
    assert len(set(values)) == len(values)


def test_variables_follow_the_keys_as_in_kumactl() -> None:
    for option in OPTIONS:
        words = re.sub(r"IPs|UIDs", lambda found: found[0].capitalize(), option.key)
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", words).replace("kuma_DPUser", "KUMA_DP_USER").replace(".", "_")
        assert option.variable.replace("_", "") == words.upper().replace("_", ""), option


def test_defaults() -> None:
    config = load()
    assert (config.inbound_port, config.outbound_port, config.dns_port) == (15006, 15001, 15053)
    assert (config.inbound_enabled, config.outbound_enabled, config.dns_enabled) == (True, True, False)
    assert (config.wait, config.max_retries, config.sleep_between_retries) == (5, 4, 2.0)
    assert config.resolv_conf == "/etc/resolv.conf"
    assert set(config.origins.values()) == {"default"}
    assert config.notices == ()


def test_precedence(yaml_file: WriteYaml) -> None:
    first = yaml_file("redirect: {inbound: {port: 1, excludePorts: [1]}, outbound: {port: 1001}, dns: {port: 11}}")
    second = yaml_file("redirect: {inbound: {excludePorts: [2, 3]}, outbound: {port: 1002}, dns: {port: 12}}")
    environ = {
        "KUMA_TRANSPARENT_PROXY_REDIRECT_DNS_PORT": "13",
        "KUMA_TRANSPARENT_PROXY_WAIT": "13",
        "TPCTL_REDIRECT_DNS_PORT": "14",
        "TPCTL_MAX_RETRIES": "1",
    }
    config = load(files=[first, second], environ=environ | {"TPCTL_LOG_LEVEL": "3"}, flags={"log_level": ["4"]})
    assert config.inbound_port == 1
    assert config.origins["inbound_port"] == f"file {first}: redirect.inbound.port"
    assert config.inbound_exclude_ports == (PortRange(2), PortRange(3))
    assert (config.outbound_port, config.origins["outbound_port"]) == (1002, f"file {second}: redirect.outbound.port")
    assert (config.dns_port, config.origins["dns_port"]) == (14, "environment TPCTL_REDIRECT_DNS_PORT")
    assert (config.wait, config.origins["wait"]) == (13, "environment KUMA_TRANSPARENT_PROXY_WAIT")
    assert (config.log_level, config.origins["log_level"]) == (4, "flag --log-level")


def test_environment_needs_no_file_and_no_unprefixed_name_is_read() -> None:
    """kumactl reads the environment only with --config, and then KUMA_DP_USER without prefix too (defect 13)."""
    environ = {"KUMA_DP_USER": "a", "IP_FAMILY_MODE": "ipv4", "EXCLUDE_PORTS_FOR_IPS": "10.0.0.1", "REDIRECT_DNS": "x"}
    config = load(environ={**environ, "TPCTL_KUMA_DP_USER": "b"})
    assert config.proxy_user == "b"
    assert config.ip_family_mode == "dualstack"
    assert config.notices == ()


def test_unknown_variables_are_a_warning() -> None:
    config = load(environ={"TPCTL_REDIRECT_DNS_PROT": "1", "KUMA_TRANSPARENT_PROXY_X": "", "KUMA_X": "1"})
    assert len(config.notices) == 2
    assert "warning: environment TPCTL_REDIRECT_DNS_PROT is not known" in config.notices[1]
    assert 'did you mean "TPCTL_REDIRECT_DNS_PORT"?' in config.notices[1]


def test_empty_variables() -> None:
    environ = {"TPCTL_REDIRECT_INBOUND_PORT": "", "TPCTL_REDIRECT_INBOUND_EXCLUDE_PORTS": ""}
    config = load(environ=environ)
    assert config.inbound_port == 15006
    assert config.inbound_exclude_ports == ()
    assert config.is_given("inbound_exclude_ports")


def test_flags_port_lists_last_wins_other_lists_accumulate() -> None:
    config = load(
        flags={
            "inbound_exclude_ports": ["1,2", "3"],
            "outbound_exclude_destinations": ["10.0.0.0/8", "fd00::/8,192.0.2.1"],
            "outbound_exclude_uids": ["tcp,udp:53,54:1", "5"],
            "inbound_port": ["1", "2"],
        }
    )
    assert config.inbound_exclude_ports == (PortRange(3),)
    assert list(map(str, config.outbound_exclude_destinations)) == ["10.0.0.0/8", "fd00::/8", "192.0.2.1/32"]
    assert len(config.outbound_exclude_uids) == 4
    assert config.inbound_port == 2


def test_uid_exclusions_in_a_variable_keep_their_commas() -> None:
    config = load(environ={"TPCTL_REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS": "udp:53,54:1; tcp:22:2"})
    assert list(map(str, config.outbound_exclude_uids)) == ["udp:53,54:1", "tcp:22:2"]


def test_a_list_given_empty_by_a_flag_replaces_the_file(yaml_file: WriteYaml) -> None:
    path = yaml_file("redirect: {inbound: {excludePorts: '22'}}")
    assert load(files=[path], flags={"inbound_exclude_ports": [""]}).inbound_exclude_ports == ()


def test_yaml_of_kumactl(yaml_file: WriteYaml) -> None:
    path = yaml_file(
        """
kumaDPUser: 5678
ipFamilyMode: IPv4
redirect:
  inbound: {port: "16006", excludePorts: "22,1000-2000", includePorts: null}
  outbound:
    excludePortsForIPs: 10.0.0.1
    excludePortsForUIDs: ["tcp:22:1", 7]
  dns:
    resolvConfigPath: /run/resolv.conf
  vnet: {networks: ["docker0:172.17.0.0/16"]}
iptablesExecutables: {iptables: /a, iptables-save: /b, iptables-restore: /c}
retry: {sleepBetweenRetries: 3s}
log:
comments: {disabled: "true"}
cniMode: false
"""
    )
    config = load(files=[path])
    assert config.proxy_user == "5678"
    assert config.ip_family_mode == "ipv4"
    assert (config.inbound_port, config.inbound_exclude_ports) == (16006, (PortRange(22), PortRange(1000, 2000)))
    assert config.outbound_exclude_destinations == (IPv4Network("10.0.0.1/32"),)
    assert len(config.outbound_exclude_uids) == 3
    assert config.resolv_conf == "/run/resolv.conf"
    assert config.executables == {"iptables": "/a", "iptables-save": "/b", "iptables-restore": "/c"}
    assert config.sleep_between_retries == 3
    assert config.comments_disabled


def test_yaml_does_not_count_in_sixties(yaml_file: WriteYaml) -> None:
    """YAML 1.1 would read the port 53 of the user 10 as the number 3190."""
    path = yaml_file("redirect: {outbound: {excludePortsForUIDs: [53:10]}}")
    assert list(map(str, load(files=[path]).outbound_exclude_uids)) == ["tcp:53:10", "udp:53:10"]
    assert "is not a port" in problems(files=[yaml_file("redirect: {inbound: {excludePorts: 10:20}}")])[0]


def test_json_is_yaml_even_with_tabs(yaml_file: WriteYaml) -> None:
    assert load(files=[yaml_file('{\n\t"redirect": {\n\t\t"dns": {"port": 5}}}')]).dns_port == 5


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"wait: 9")))
    config = load(files=["-"])
    assert (config.wait, config.origins["wait"]) == (9, "file stdin: wait")


def test_an_empty_file_is_fine(yaml_file: WriteYaml) -> None:
    assert load(files=[yaml_file(""), yaml_file("# nothing\n")]) == load()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n- b\n", "holds a list"),
        ("hello", "holds the single value 'hello'"),
        ("a: [", "is not YAML"),
        ("wait: 1\nwait: 2\n", "line 2: wait is given twice"),
        ("--- {}\n--- {}\n", "is not YAML"),
        ("redirect: 5", "redirect: 5 is a value where keys are expected, as in redirect.inbound.enabled"),
        ("redirect: [inbound]", "is a value where keys are expected"),
        ("redirect: {inbound: {prot: 5}}", 'prot: there is no such key; did you mean "redirect.inbound.port"'),
        ("kumaDpUser: x", 'kumaDpUser: there is no such key; did you mean "kumaDPUser"'),
        ("zzz: x", "zzz: there is no such key"),
        ("1: x", "1: there is no such key"),
        ("redirect: {inbound: {port: [1]}}", "redirect.inbound.port: [1] is not a port"),
        ("redirect: {inbound: {enabled: 1}}", "redirect.inbound.enabled: 1 is neither true nor false"),
        ("redirect: {inbound: {excludePortsForUIDs: ['tcp:22:1']}}", "packets that arrive have no owner"),
        ("cniMode: true", "tpctl is a host agent"),
        ("log: {level: 8}", "log.level: 8 is not a whole number from 0 to 7"),
        ("ipFamilyMode: ipv6", 'ipFamilyMode: "ipv6" is not one of dualstack, ipv4'),
        ("x: !!python/object/apply:os.system [id]", "is not YAML"),
    ],
)  # fmt: skip
def test_bad_files(yaml_file: WriteYaml, text: str, problem: str) -> None:
    path = yaml_file(text)
    (said,) = problems(files=[path])
    assert said.startswith(f"file {path}: ")
    assert problem in said


KEYS = st.sampled_from(sorted({part for option in OPTIONS for part in option.key.split(".")}))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["80", "2s"])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(TREES)
def test_any_file_is_read_or_refused_with_reasons(tree: object) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(tree, file)
        file.flush()
        said: tuple[str, ...] = ("none",)
        try:
            load(files=[file.name])
        except InputError as error:
            said = error.problems
    assert said
    assert all(said)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin1"
    latin.write_bytes(b"kumaDPUser: \xe9")
    said = problems(files=[str(tmp_path / "missing"), str(tmp_path), str(latin)])
    assert [line.split(": ", 1)[1] for line in said] == [
        "cannot be read: No such file or directory",
        "cannot be read: Is a directory",
        "is not UTF-8 text (byte 12)",
    ]


def test_a_file_without_permission(yaml_file: WriteYaml) -> None:
    path = yaml_file("wait: 1")
    Path(path).chmod(0)
    was = os.geteuid()
    if was == 0:
        os.seteuid(NOBODY)  # root may read everything
    try:
        (said,) = problems(files=[path])
    finally:
        os.seteuid(was)
    assert said == f"file {path}: cannot be read: Permission denied"


def test_everything_wrong_is_reported_in_one_go(yaml_file: WriteYaml) -> None:
    path = yaml_file("redirect: {inbound: {prot: 1, port: 0}}\nwait: soon\n")
    said = problems(
        files=[path, "/nonexistent"],
        environ={"TPCTL_REDIRECT_OUTBOUND_PORT": "65536", "TPCTL_CNI_MODE": "true"},
        flags={"dns_port": ["8o"], "inbound_exclude_ports": ["20-10,,"], "virtual_networks": ["a:10.0.0.0/8"] * 2},
    )
    assert [line.split(": ")[0] for line in said] == [
        f"file {path}", "file /nonexistent", "environment TPCTL_CNI_MODE", f"file {path}", f"file {path}",
        "environment TPCTL_REDIRECT_OUTBOUND_PORT", "flag --redirect-dns-port", "flag --exclude-inbound-ports",
    ]  # fmt: skip


@pytest.mark.parametrize("row", UNSUPPORTED, ids=lambda row: row.variable)
@pytest.mark.parametrize("prefix", ["TPCTL_", "KUMA_TRANSPARENT_PROXY_"])
def test_inputs_that_cannot_be_carried_out_are_refused(prefix: str, row: Unsupported) -> None:
    variable, reason = row.variable, row.reason
    assert problems(environ={prefix + variable: "1"}) == (f"environment {prefix}{variable}: {reason}",)
    assert load(environ={prefix + variable: ""})


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"dns_enabled": ["true"], "dns_capture_all": ["true"]}, "--redirect-dns and flag --redirect-all-dns-traffic"),
        ({"inbound_port": ["5"], "outbound_port": ["5"]}, "--redirect-inbound-port and flag --redirect-outbound-port"),
        ({"inbound_port": ["15001"]}, "and flag --redirect-outbound-port (its default): both are port 15001"),
        ({"dns_port": ["15006"], "dns_tcp": ["true"], "dns_enabled": ["true"]}, "both are port 15006"),
        ({"virtual_networks": ["a:10.0.0.0/8", "a:10.1.0.0/16"]}, "a is given twice for IPv4"),
        ({"virtual_networks": ["a:fd00::/64", "a:fd01::/64"]}, "a is given twice for IPv6"),
    ],
)
def test_impossible_combinations(flags: dict[str, list[str]], problem: str) -> None:
    (said,) = problems(flags=flags)
    assert problem in said


@pytest.mark.parametrize(
    "flags",
    [
        {"dns_enabled": ["false"], "dns_capture_all": ["true"]},
        {"dns_port": ["15006"], "dns_enabled": ["true"]},
        {"virtual_networks": ["a:10.0.0.0/8", "a:fd00::/64", "a+:10.0.0.0/8"]},
    ],
)
def test_possible_combinations(flags: dict[str, list[str]]) -> None:
    load(flags=flags)


def test_both_dns_settings_in_a_file_are_fine(yaml_file: WriteYaml) -> None:
    """captureAll implies enabled in kumactl's files; only its flags exclude each other."""
    config = load(files=[yaml_file("redirect: {dns: {enabled: true, captureAll: true}}")])
    assert config.dns_capture_all


@pytest.mark.parametrize(
    ("flags", "notice"),
    [
        ({"inbound_exclude_ports": ["22"], "inbound_include_ports": ["80"]}, "flag --exclude-inbound-ports is ignored"),
        ({"outbound_exclude_ports": ["22"], "outbound_include_ports": ["80"]}, "--exclude-outbound-ports is ignored"),
        ({"dns_enabled": ["false"], "dns_capture_all": ["true"]}, "--redirect-dns is false but has no effect"),
        ({"dns_tcp": ["true"]}, "flag --redirect-dns-tcp has no effect"),
        ({"executables": ["iptables:/a,iptables-save:/b"]}, "because iptables-restore is missing"),
        ({"outbound_exclude_destinations": ["10.0.0.5/8"]}, "taken as 10.0.0.0/8"),
        ({"sleep_between_retries": ["2"]}, "flag --sleep-between-retries: 2 is taken as nanoseconds"),
    ],
)
def test_notices(flags: dict[str, list[str]], notice: str) -> None:
    (said,) = load(flags=flags).notices
    assert notice in said


def test_a_note_on_a_value_that_was_overridden_is_not_made(yaml_file: WriteYaml) -> None:
    path = yaml_file("redirect: {outbound: {excludePortsForIPs: 10.0.0.5/8}}")
    assert load(files=[path], flags={"outbound_exclude_destinations": ["10.0.0.0/8"]}).notices == ()

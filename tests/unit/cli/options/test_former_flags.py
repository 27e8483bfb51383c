"""Flags of kumactl that tpctl has not: taken for what they mean now, or refused, and all of them documented."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tpctl.cli.main import KUMACTLS
from tpctl.cli.options.former_flags import GLOBAL, INSTALL, UNINSTALL, Former, translated
from tpctl.config.options import OPTIONS
from tpctl.system.errors import InputError

PAGE = (Path(__file__).resolve().parents[4] / "docs/kumactl.md").read_text(encoding="utf-8")


def tpctl(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tpctl.cli.main", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def configuration(*words: str) -> dict[str, object]:
    done = tpctl("install", *words, "--print-config", "--json")
    assert done.returncode == 0, done.stderr
    return {key: row["value"] for key, row in json.loads(done.stdout)["config"].items() if row["origin"] != "default"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--kuma-dp-uid", "1234"), {"kumaDPUser": "1234"}),
        (("--kuma-dp-uid=1234", "transparent-proxy"), {"kumaDPUser": "1234"}),
        (
            ("--exclude-outbound-tcp-ports-for-uids", "22,80-90:103,106-108",
             "--exclude-outbound-udp-ports-for-uids=53:1"),
            {"redirect.outbound.excludePortsForUIDs": ["tcp:22,80-90:103", "tcp:22,80-90:106-108", "udp:53:1"]},
        ),
        (("--skip-resolv-conf", "--no-config", "--kuma-cp-ip", "10.0.0.1", "--api-timeout=1m"), {}),
        (("--redirect-inbound-port-v6", "15010", "--redirect-dns-upstream-target-chain=RETURN"), {}),
        (("--skip-resolv-conf=true", "--redirect-dns"), {"redirect.dns.enabled": True}),
    ],
    ids=str,
)  # fmt: skip
def test_what_they_mean_now(words: tuple[str, ...], found: dict[str, object]) -> None:
    assert configuration(*words) == found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("install", "--redirect-inbound-port-v6", "0"), "--ip-family-mode ipv4"),
        (("install", "--redirect-dns-upstream-target-chain", "MINE"), "leave it out"),
        (("install", "--kuma-dp-uid"), "it needs a value"),
        (("install", "transparent-proxy-validator"), "`tpctl verify` rehearses a policy"),
        (("install", "transparent-proxy-validator", "--validation-server-port", "15006"), "`tpctl verify`"),
        (("uninstall", "transparent-proxy-validator"), "takes no argument but"),
        (("install", "control-plane"), "the only argument is transparent-proxy"),
    ],
    ids=str,
)
def test_what_is_refused_with_the_new_word(words: tuple[str, ...], said: str) -> None:
    done = tpctl(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_before_the_command_as_with_kumactl() -> None:
    done = tpctl("--no-config", "--config-file", "/nonexistent", "version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "tpctl,")
    assert done.stderr.count("note: ") == 2
    assert tuple(former.flag for former in GLOBAL) == KUMACTLS


def test_everything_behind_two_hyphens_is_left_alone() -> None:
    assert translated(["--yes", "--", "--no-config"], INSTALL) == (["--yes", "--", "--no-config"], [])
    with pytest.raises(InputError):
        translated(["--kuma-cp-ip"], INSTALL)


@pytest.mark.parametrize("former", dict.fromkeys((*INSTALL, *UNINSTALL)), ids=lambda former: former.flag)
def test_none_is_one_of_tpctls_own_and_each_is_documented(former: Former) -> None:
    assert f"| `{former.flag}` |" in PAGE
    if former in INSTALL:
        assert former.flag not in {option.flag for option in OPTIONS}
        assert former.flag not in tpctl("install", "--help").stdout

"""The legacy variant with python-iptables and without: the same rules, and the same care for everybody else's."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.legacy_ways import iptc_that_says, without_python_iptables
from tests.netns.lab import PROXY_USER, bare_namespace, run, snapshot, tpctl
from tpctl.engines import presence
from tpctl.engines.iptables import legacy, libiptc, nft_hooks, tools
from tpctl.engines.iptables.change import Declare, Place, TableChange
from tpctl.engines.iptables.engine import IptablesEngine, select
from tpctl.engines.iptables.parts import FamilyRules, Jump, TableRules
from tpctl.engines.iptables.plan import IptablesPlan
from tpctl.engines.iptables.rule import Option, Rule, match
from tpctl.rehearsal.namespaces import Namespace
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family
from tpctl.system.errors import ApplyError

pytestmark = pytest.mark.root

INSTALL = ("--kuma-dp-user", PROXY_USER, "--engine", "iptables", "--iptables-mode", "legacy", "--redirect-dns")
FULL = (*INSTALL, "--exclude-inbound-ports", "22,80,4000-5000", "--exclude-outbound-ports-for-uids", "tcp:443:7-9")
OTHER_IPTC = {
    "missing": 'raise ModuleNotFoundError("No module named iptc")',
    "broken": 'raise OSError("libxtables.so.12: cannot open shared object file")',
    "of another version": "class Table:\n    ALL = ['nat', 'mangle', 'raw']\nclass Table6(Table):\n    pass",
    "crashing": "import os, signal\nclass Table:\n    @property\n    def ALL(self):\n        pass\n"
    "def __getattr__(name):\n    os.kill(os.getpid(), signal.SIGSEGV)",
}
SAMPLE = TableChange(
    "nat",
    (
        Declare("TPCTL_OUTBOUND"),
        Place("TPCTL_OUTBOUND", Rule("RETURN", protocol="tcp", matches=(match("multiport", ("dports", "22,80")),))),
    ),
)


@pytest.fixture
def host() -> Iterator[Namespace]:
    with bare_namespace() as space, space.inside():
        yield space


@pytest.fixture(params=["python-iptables", "iptables-legacy-restore"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways in turn; the first where it works."""
    with ExitStack() as stack:
        if request.param == "iptables-legacy-restore":
            stack.enter_context(without_python_iptables())
        else:
            found = tools.find("legacy", Family.IPV4)
            assert found
            if obstacle := libiptc.obstacle(found, [SAMPLE], comments=True):
                pytest.skip(obstacle)
        yield str(request.param)


def status() -> dict[str, Any]:
    """What `tpctl status` says; no data plane listens here, which it calls a problem."""
    found: dict[str, Any] = json.loads(tpctl("status", "--verbose", "--json", check=False).stdout)
    return found


def rules() -> list[str]:
    """Those of both families."""
    listed = [run([f"{tool}-legacy-save"]).stdout for tool in ("iptables", "ip6tables")]
    return [line for text in listed for line in text.splitlines() if line[:1] not in "#:"]


def test_either_way_says_which_it_is_and_holds_the_plan(way: str, host: Namespace) -> None:
    assert f"written by {way}" in tpctl("install", *FULL, "--verbose").stderr
    found = status()
    assert found["way"].startswith(way)
    assert found["variant"] == "legacy"
    assert found["drift"] == []
    assert found["families"] == [4, 6]
    run(["iptables-legacy", "-t", "nat", "-D", "TPCTL_OUTBOUND", "1"])
    assert status()["drift"]
    tpctl("apply")
    assert status()["drift"] == []


def test_both_ways_write_the_same(host: Namespace) -> None:
    tpctl("install", *FULL)
    first = rules()
    with without_python_iptables():
        tpctl("uninstall")
        tpctl("install", *FULL)
    assert rules() == first
    tpctl("uninstall")


def test_one_way_replaces_and_removes_what_the_other_installed(way: str, host: Namespace) -> None:
    with without_python_iptables():
        tpctl("install", *INSTALL)
    tpctl("install", *FULL)
    assert status()["drift"] == []
    with without_python_iptables():
        tpctl("uninstall")
    assert not [line for line in rules() if "TPCTL" in line]


def test_others_keep_their_rules_chains_policies_and_counters(way: str, host: Namespace) -> None:
    for command in (
        "-t nat -N OTHERS",
        '-t nat -A OTHERS -p udp -m comment --comment "it\'s -A OUTPUT" -j ACCEPT',
        "-t nat -A OUTPUT -p udp --dport 9 -j OTHERS",
        "-t mangle -P OUTPUT DROP",
        "-t mangle -A OUTPUT -o lo -j ACCEPT",
    ):
        run(["sh", "-c", f"iptables-legacy {command}"])
    run(["bash", "-c", "echo > /dev/udp/127.0.0.1/9"])
    for table in ("filter", "nat", "mangle", "raw"):  # which nobody can take away from a namespace again
        run(["iptables-legacy-save", "-t", table])
        run(["ip6tables-legacy-save", "-t", table])
    before = snapshot(counters=True)
    assert re.search(r"^:INPUT ACCEPT \[[1-9]", before["iptables-legacy-save"], re.MULTILINE)
    tpctl("install", *FULL)
    counted = r"^\[[1-9].* -A OUTPUT -o lo -j ACCEPT$"
    assert re.search(counted, snapshot(counters=True)["iptables-legacy-save"], re.MULTILINE)
    tpctl("install", *INSTALL)
    tpctl("uninstall")
    assert snapshot(counters=True) == before


def test_what_the_kernel_refuses_half_way_is_taken_back(way: str, host: Namespace) -> None:
    engine = select(EngineOptions(engine="iptables", iptables_mode="legacy", max_retries=0))
    engine.apply(_plan("TPCTL_OUTBOUND"))
    before = rules()
    with pytest.raises(ApplyError, match="rolled back"):
        engine.apply(_plan("TPCTL_OTHER", broken=True))
    assert rules() == before
    engine.remove()


def _plan(chain: str, *, broken: bool = False) -> IptablesPlan:
    """Of two tables; with a rule in the second one that makes the kernel refuse it: a chain that is not there."""
    first = TableRules("nat", ((chain, (Rule("RETURN"),)),), (Jump("OUTPUT", Rule(chain, protocol="tcp")),))
    target = "TPCTL_NOWHERE" if broken else "RETURN"
    second = TableRules("mangle", ((f"{chain}_2", (Rule(target),)),), ())
    return IptablesPlan((FamilyRules(Family.IPV4, (first, second)),))


@pytest.mark.parametrize("iptc", sorted(OTHER_IPTC))
def test_a_python_iptables_that_does_not_work_is_not_needed(iptc: str, host: Namespace) -> None:
    with iptc_that_says(OTHER_IPTC[iptc]):
        tpctl("install", *FULL)
        found = status()
        assert found["drift"] == []
        assert found["way"].startswith("iptables-legacy-restore, because ")
        tpctl("uninstall")
    assert not [line for line in rules() if "TPCTL" in line]


def test_thousands_of_rules_are_not_built_one_by_one_in_python(
    host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tools.find("legacy", Family.IPV4)
    assert found
    backend = legacy.LegacyBackend(found, EngineOptions())
    monkeypatch.setattr(libiptc, "commit", lambda *_, **__: pytest.fail("python-iptables was used"))
    chain = tuple(Place("TPCTL_MANY", Rule("RETURN", protocol="tcp")) for _ in range(legacy.MOST_OPERATIONS))
    backend.commit((TableChange("nat", (Declare("TPCTL_MANY"), *chain)),), comments=True)
    assert len(list(backend.save()["nat"].rules_of("TPCTL_MANY"))) == legacy.MOST_OPERATIONS


def _other_port(extension: Any, options: tuple[Option, ...]) -> None:
    for option in options:
        extension.set_parameter(option.name, "23")


def test_what_would_be_written_wrongly_is_found_out_where_it_does_no_harm(
    host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tools.find("legacy", Family.IPV4)
    assert found
    if obstacle := libiptc.obstacle(found, [SAMPLE], comments=True):
        pytest.skip(obstacle)
    libiptc.forget_outcomes()
    monkeypatch.setattr(libiptc, "_set_options", _other_port)
    said = libiptc.obstacle(found, [SAMPLE], comments=True)
    libiptc.forget_outcomes()
    assert said
    assert "--dports 23" in said
    assert not presence.legacy_tables_exist(Family.IPV4), "it was tried in the host's own tables"


def test_without_a_namespace_to_try_it_in_it_is_not_tried(host: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise PermissionError(1, "Operation not permitted")

    found = tools.find("legacy", Family.IPV4)
    assert found
    libiptc.forget_outcomes()
    monkeypatch.setattr(libiptc, "into_own_network", refused)
    assert libiptc.obstacle(found, [SAMPLE], comments=True)
    libiptc.forget_outcomes()


def test_the_lock_is_the_one_of_iptables_and_held_while_programs_write(host: Namespace) -> None:
    """`flock --nonblock` as the restore program fails where the lock is held."""
    with without_python_iptables():
        engine = select(EngineOptions(engine="iptables", iptables_mode="legacy", wait_seconds=0, max_retries=0))
        assert isinstance(engine, IptablesEngine)
        with subprocess.Popen(
            ["flock", "/run/xtables.lock", "sh", "-c", "echo held; read line"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as other:  # fmt: skip
            assert other.stdout
            assert other.stdin
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ApplyError, match="another program has held"):
                engine.apply(_plan("TPCTL_OUTBOUND"))
            other.stdin.close()
        assert not rules()


def test_empty_chains_that_stay_keep_no_rule_of_either_variant(
    host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To take them away is the last thing, and of iptables-nft only."""
    for variant in tools.VARIANTS:
        for tool in ("iptables", "ip6tables"):
            run([f"{tool}-{variant}", "-t", "nat", "-N", "TPCTL_OUTBOUND"])
            run([f"{tool}-{variant}", "-t", "nat", "-A", "OUTPUT", "-j", "TPCTL_OUTBOUND"])

    def too_slow(_: object) -> None:
        raise ApplyError("the kernel's rules could not be worked on within 60 s")

    engine = select(EngineOptions(engine="iptables"))
    with monkeypatch.context() as patch:
        patch.setattr(nft_hooks, "remove_empty", too_slow)
        with pytest.raises(ApplyError, match=r"within 60 s; they stay, but no traffic is redirected any more"):
            engine.remove(footprint={})
    for variant in tools.VARIANTS:
        for tool in ("iptables", "ip6tables"):
            assert "TPCTL" not in run([f"{tool}-{variant}-save"]).stdout
    assert "chain OUTPUT" in run(["nft", "list", "ruleset"]).stdout
    engine.remove(footprint={})
    assert run(["nft", "list", "ruleset"]).stdout == ""

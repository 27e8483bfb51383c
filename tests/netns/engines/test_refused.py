"""What the kernel refuses is told in our words, with what to do, before anything has been changed."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.netns.lab import PROXY_USER, bare_namespace, run, snapshot, tpctl
from tpctl.engines import refused
from tpctl.spec.policy import Family

pytestmark = pytest.mark.root

ENGINES = {
    "nftables": ("--engine", "nftables"),
    "iptables": ("--engine", "iptables", "--iptables-mode", "nft"),
    "legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
}
MUTE = ("Traceback", "[Errno", "internal error")


@pytest.fixture
def host() -> Iterator[None]:
    with bare_namespace() as space, space.inside():
        yield


def told(*words: str, code: int = 2) -> str:
    """What a command says that is refused; the kernel's rules are then as they were."""
    before = snapshot(counters=False)
    done = tpctl(*words, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert not [each for each in MUTE if each in said], said
    assert snapshot(counters=False) == before
    return said


def install(engine: str) -> tuple[str, ...]:
    return ("install", "--kuma-dp-user", PROXY_USER, *ENGINES[engine])


@pytest.mark.parametrize(
    ("table", "chain", "where"),
    [
        ("nat", "PREROUTING", "type nat hook prerouting priority -50;"),
        ("nat", "OUTPUT", "type filter hook output priority -100;"),
        ("mangle", "POSTROUTING", "type filter hook output priority -150;"),
    ],
)
def test_a_table_that_iptables_cannot_share(host: None, table: str, chain: str, where: str) -> None:
    run(["nft", "-f", "-"], stdin=f"table ip {table} {{ chain {chain} {{ {where} }}\n }}\n")
    said = told(*install("iptables"))
    assert f"the table ip {table} of nf_tables was not made by iptables: its chain {chain} is of type" in said
    assert "use --engine nftables" in said
    tpctl(*install("nftables"))
    tpctl("uninstall")


def test_a_native_table_that_can_be_shared_is(host: None) -> None:
    """Other chains in it do no harm: the tools of iptables pass over them."""
    run(["nft", "-f", "-"], stdin="table ip nat { chain prerouting { type nat hook prerouting priority -100; }\n }\n")
    tpctl(*install("iptables"))
    assert '"drift": []' in tpctl("status", "--json", check=False).stdout
    tpctl("uninstall")
    assert "chain prerouting {" in run(["nft", "list", "ruleset"]).stdout


@pytest.mark.parametrize("where", ["inet tpctl", "ip nat"])
def test_a_table_of_a_process_that_lets_nobody_else_change_it(host: None, where: str) -> None:
    with subprocess.Popen(["nft", "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin
        assert owner.stdout
        try:
            owner.stdin.write(f"add table {where} {{ flags owner; }}\nlist tables\n")
            owner.stdin.flush()
            line = owner.stdout.readline()
            while line and f"table {where}" not in line.removeprefix("nft> "):
                line = owner.stdout.readline()
            if "flags owner" not in run(["nft", "list", "table", *where.split()]).stdout:
                pytest.skip("tables have no owners here (Linux 5.12, nft 0.9.9)")
            said = told(*install("nftables" if where == "inet tpctl" else "iptables"))
            assert f"the table {where} of nf_tables belongs to the process {owner.pid} (nft)" in said
            assert tpctl("status", check=False).returncode in (0, 3)
            if where == "inet tpctl":
                assert "belongs to the process" in told("uninstall", code=1)
        finally:
            owner.stdin.close()
            owner.wait(timeout=60)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here")
@pytest.mark.parametrize("engine", list(ENGINES))
def test_without_the_capability(host: None, engine: str) -> None:
    bare = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable]
    for words in (install(engine), ("status",), ("uninstall",)):
        done = run([*bare, "-m", "tpctl.cli.main", *words], check=False)
        assert "needs CAP_NET_ADMIN" in done.stderr, done.stderr
        assert not [each for each in MUTE if each in done.stderr], done.stderr
        assert done.returncode == (1 if words == ("uninstall",) else 2)


def test_the_kernel_says_what_it_has(host: None) -> None:
    assert refused.cause_in_nf_tables() is None
    assert refused.cause_in_nf_tables("Error: Could not process rule: Cannot allocate memory") is not None
    assert refused.cause_in_x_tables(Family.IPV4, ["nat"]) is None
    lacking = refused.cause_in_x_tables(Family.IPV6, ["nat", "nosuch"])
    assert lacking is not None
    assert "lacks the table nosuch of ip6tables-legacy" in str(lacking)
    assert "modprobe ip6table_nosuch" in str(lacking)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EPERM, "CAP_NET_ADMIN"), (errno.EINVAL, "modprobe -a nf_tables"), (errno.ENOBUFS, "not enough memory")],
)
def test_each_answer_has_its_words(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    monkeypatch.setattr(refused, "_answer", lambda: number)
    assert words in str(refused.cause_in_nf_tables())


@pytest.mark.parametrize("engine", list(ENGINES))
def test_ipv6_turned_off_for_lo_alone(host: None, engine: str) -> None:
    run(["sysctl", "-qw", "net.ipv6.conf.lo.disable_ipv6=1"])
    said = told(*install(engine))
    assert "sysctl -w net.ipv6.conf.lo.disable_ipv6=0" in said
    assert "--ip-family-mode ipv4" in said
    tpctl(*install(engine), "--ip-family-mode", "ipv4")
    tpctl("uninstall")


@pytest.mark.parametrize("engine", list(ENGINES))
def test_ipv6_turned_off_everywhere(host: None, engine: str) -> None:
    run(["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"])
    done = tpctl(*install(engine))
    assert "IPv6 is left alone: it is turned off on this host" in done.stdout + done.stderr
    tpctl("uninstall")

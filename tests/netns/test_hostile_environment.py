"""Hostile surroundings of the command: PATH, preloaded libraries, the working directory, and rules of others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.hostile_room import Room, ok, room
from tests.netns.lab import PROXY_USER

pytestmark = pytest.mark.root

FAKED = (
    "nft", "iptables", "ip6tables", "iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore",
    "iptables-nft", "iptables-nft-save", "iptables-nft-restore", "iptables-legacy", "iptables-legacy-save",
    "iptables-legacy-restore", "modprobe", "ldconfig", "gcc", "cc", "ld", "objdump", "firewall-cmd", "systemctl",
    "systemd-run", "sh", "bash", "uname", "ip", "sysctl", "conntrack",
)  # fmt: skip
LIBRARIES = (
    "xtables",
    "xtwrapper",
    "libxtwrapper",
    "ip4tc",
    "libip4tc",
    "ip6tc",
    "iptc",
    "libxtables",
    "libxtables.so",
)
WITNESS = """
#include <fcntl.h>
#include <unistd.h>
#include <string.h>
__attribute__((constructor)) static void note(void)
{
    char name[512];
    ssize_t length = readlink("/proc/self/exe", name, sizeof(name) - 1);
    int file = open(WHERE, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (length < 0 || file < 0)
        return;
    name[length] = '\\n';
    write(file, name, length + 1);
    close(file);
}
"""
ENGINES = [
    ("nftables", "--engine", "nftables"),
    ("nft", "--engine", "iptables", "--iptables-mode", "nft"),
    ("legacy", "--engine", "iptables", "--iptables-mode", "legacy"),
]


@pytest.fixture(scope="module")
def host() -> Iterator[Room]:
    with room() as made:
        yield made


def library(folder: Path, name: str) -> Path:
    """A shared library that writes down which program has loaded it, into a file of its name."""
    source = folder / f"{name}.c"
    source.write_text(WITNESS)
    built = folder / f"{name}.so.1"
    where = f'-DWHERE="{folder / name}"'
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", where, "-o", str(built), str(source)], check=True)
    return built


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine[0])
def test_nothing_of_the_callers_path_libraries_or_directory_is_run(
    host: Room, engine: tuple[str, ...], tmp_path: Path
) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    for name in FAKED:
        (planted / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/faked\n")
        (planted / name).chmod(0o755)
    (planted / "profile").write_text(f"echo a shell >> {tmp_path}/faked\n")
    preloaded = library(tmp_path, "preloaded")
    for name in LIBRARIES:
        (planted / name).symlink_to(library(tmp_path, "here") if name == LIBRARIES[0] else tmp_path / "here.so.1")
    (planted / "libxt_comment.so").symlink_to(tmp_path / "here.so.1")
    environment = {
        "PATH": str(planted), "LD_PRELOAD": str(preloaded), "BASH_ENV": str(planted / "profile"),
        "ENV": str(planted / "profile"), "PYTHONPATH": str(ROOT_DIRECTORY / "agent"), "IFS": "/",
        "TMPDIR": str(planted), "XTABLES_LIBDIR": str(planted), "IPTABLES_LIBDIR": str(planted),
        "PYTHON_IPTABLES_XTABLES_VERSION": "1",
        "IPTABLES_LIB_DIR": str(planted), "BCC_KERNEL_SOURCE": str(planted), "CPATH": str(planted),
        "SSH_CONNECTION": "'; touch x", "NOTIFY_SOCKET": str(planted / "notify"), "LISTEN_FDS": "999999",
        "LISTEN_PID": "self", "LC_ALL": "xx_XX", "LANG": "../../x", "COLUMNS": "-1", "HOME": "/nonexistent",
    }  # fmt: skip

    def tpctl(*words: str) -> subprocess.CompletedProcess[str]:
        # -P: as the installed command, which does not look for its modules in the working directory.
        argv = [sys.executable, "-P", "-m", "tpctl.cli.main", *words]
        return host.run(*argv, environment=environment, folder=planted)

    flags = ["--kuma-dp-user", PROXY_USER, "--ip-family-mode", "ipv4", "--redirect-all-dns-traffic"]
    ok(tpctl("install", *flags, *engine[1:]))
    assert "TPCTL" in host.rules().upper()
    assert re.search(r"drift +none", tpctl("status").stdout)
    ok(tpctl("uninstall"))
    assert "tpctl" not in host.rules().lower()
    assert not (tmp_path / "faked").exists()
    assert not (tmp_path / "here").exists()
    loaded = set((tmp_path / "preloaded").read_text().split())
    started = {name for name in loaded if "python" not in name and "nsenter" not in name}
    assert started == set(), "a program was given the caller's environment"
    assert any("python" in name for name in loaded), "the witness works"


# -- rules of others that look like ours -------------------------------------------------------------------------------

COMMENTS = (
    "tpctl/i0: new connections to this host (tpctl 0.1.0)",
    "tpctl/o7: everything else",
    "-j TPCTL_OUTBOUND",
    '" -j TPCTL_OUTBOUND "',
    "x\n-A OUTPUT -j TPCTL_OUTBOUND",
    "x\nCOMMIT\n*nat\n:TPCTL_EVIL - [0:0]\n-A PREROUTING -j TPCTL_EVIL\nCOMMIT",
    "a\r-A OUTPUT -j TPCTL_OUTBOUND",
    "a\x0b-A OUTPUT -j TPCTL_X\x0c:TPCTL_Y - [0:0]\x1c\u2028:TPCTL_Z - [0:0]\x85",
    "$(touch /run/owned); `touch /run/owned`; ' || true #",
    "it's \\\" \\\\ ünïcode \u202e",
    "KUMA_MESH_OUTBOUND and kuma/mesh/transparent/proxy/",
    "-",
    "--",
    "-j",
    "--comment",
    "!",
    "",
    "x" * 255,
)


def foreign(host: Room, variant: str) -> None:
    for place, comment in enumerate(COMMENTS):
        chain = ("OUTPUT", "PREROUTING")[place % 2]
        rule = ["-p", "udp", "--dport", str(7000 + place), "-m", "comment", "--comment", comment, "-j", "RETURN"]
        ok(host.run(f"iptables-{variant}", "-t", "nat", "-A", chain, *rule))


@pytest.mark.parametrize(
    ("variant", "engine"),
    list(zip(("legacy", "nft", "legacy"), ENGINES, strict=True)),
    ids=[engine[0] for engine in ENGINES],
)
@pytest.mark.needs("legacy")
def test_rules_of_others_whose_comments_look_like_ours_stay_in_place(variant: str, engine: tuple[str, ...]) -> None:
    with room() as host:
        foreign(host, variant)
        listing = f"iptables-{variant}-save"
        for table in ("filter", "nat", "mangle", "raw"):  # a legacy table that was once used stays, empty
            ok(host.run(listing, "-t", table))
        before = [line for line in ok(host.run(listing)).splitlines() if not line.startswith(("#", ":"))]
        assert len(before) > len(COMMENTS)
        for flags in ((), ("--exclude-inbound-ports", "22")):
            ok(host.install(*engine[1:], *flags))
            assert json.loads(host.tpctl("status", "--json").stdout)["drift"] == []
        ok(host.tpctl("uninstall"))
        after = [line for line in ok(host.run(listing)).splitlines() if not line.startswith(("#", ":"))]
        assert after == before
        assert not host.path("/run/owned").exists()
        assert "nothing to do" in ok(host.tpctl("uninstall"))


@pytest.mark.parametrize(("variant", "engine"), [("nft", ENGINES[1]), ("legacy", ENGINES[2])], ids=["nft", "legacy"])
def test_whatever_the_comment_of_a_rule_among_ours_it_is_read_and_goes(variant: str, engine: tuple[str, ...]) -> None:
    """Somebody has put rules into our chain, and jumps to it beside ours."""
    with room() as host:
        for flags in (("--exclude-inbound-ports", "22"), ()):
            ok(host.install(*engine[1:], *flags))
            for comment in COMMENTS:
                said = ["-p", "tcp", "--dport", "7", "-m", "comment", "--comment", comment]
                ok(host.run(f"iptables-{variant}", "-t", "nat", "-A", "TPCTL_OUTBOUND", *said, "-j", "RETURN"))
                ok(host.run(f"iptables-{variant}", "-t", "nat", "-A", "OUTPUT", *said, "-j", "TPCTL_OUTBOUND"))
            drift = json.loads(host.tpctl("status", "--json").stdout)["drift"]
            assert len(drift) >= len(COMMENTS), drift
        ok(host.tpctl("uninstall"))
        assert "-A" not in ok(host.run(f"iptables-{variant}-save"))


NFT = """
table inet tpctl_other {
    comment "tpctl/"
    chain output { type nat hook output priority -100; udp dport 7000 return comment "tpctl/o7: everything else"; }
    chain TPCTL_OUTBOUND { counter return comment "tpctl/i0: new connections (tpctl 0.1.0)"; }
}
table ip tpctl { chain TPCTL_OUTBOUND { counter; }; chain draining { type filter hook output priority 0; }; }
table inet tpctl_answers2 { set draining_ports { type inet_service; elements = { 1 }; }; }
"""


def test_tables_of_others_whose_names_and_comments_look_like_ours_stay(tmp_path: Path) -> None:
    with room() as host:
        (tmp_path / "others.nft").write_text(NFT)
        ok(host.run("nft", "--file", str(tmp_path / "others.nft")))
        before = host.rules()
        for engine in ENGINES[:2]:
            ok(host.install(*engine[1:]))
        ok(host.tpctl("uninstall"))
        assert host.rules() == before

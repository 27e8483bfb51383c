"""libnftables and the nft program are the same to the engine; so are the two ways to read conntrack."""

from __future__ import annotations

import errno
import re
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.netns.engines.test_nftables_swap import REMOTES, dial, scene, who
from tests.netns.lab import APP, PROXY, bare_namespace, run
from tpctl.engines.base import REDIRECTING, SIGNATURE
from tpctl.engines.nftables import drain, nft, probe, scratch
from tpctl.engines.nftables.engine import NftablesEngine, load
from tpctl.engines.nftables.nft import LibraryNft, Nft, NftError, ProgramNft
from tpctl.engines.nftables.parts import interface
from tpctl.engines.nftables.probe import EVERYTHING
from tpctl.host import conntrack
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, PEER, PEER_ADDRESS, stage
from tpctl.rehearsal.sockets import AF
from tpctl.spec.engine_options import EngineOptions
from tpctl.spec.policy import Family, Policy
from tpctl.system.errors import HostError

pytestmark = pytest.mark.root


def without_comments(text: str) -> str:
    """What a preview says without the lines that only people read."""
    return re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)


def ways() -> list[Nft]:
    return [nft.find(), ProgramNft()]


@pytest.mark.parametrize("way", ways(), ids=lambda way: way.description)
def test_install_inspect_and_remove(way: Nft) -> None:
    with bare_namespace() as space, space.inside():
        before = run(["nft", "list", "ruleset"]).stdout
        probe.require(way)
        assert run(["nft", "list", "ruleset"]).stdout == before
        engine = NftablesEngine(way, EngineOptions())
        assert way.description in engine.reason
        plan = engine.plan(EVERYTHING)
        assert without_comments(engine.preview(EVERYTHING)) == "".join(plan.transactions(None))
        assert engine.apply(plan).replaced == ()
        assert engine.apply(plan).replaced == ("tpctl's rules (nftables)",)
        found = engine.inspect(plan)
        assert (found.installed, found.families, found.drift) == (True, (4, 6), ())
        assert {counter.family for counter in found.counters} == {0, 4, 6}
        assert engine.inspect(engine.plan(Policy(PROXY))).drift
        with pytest.raises(NftError):
            way.execute("add rule inet tpctl nowhere accept\n")
        listed = engine.remove(dry_run=True).removed
        assert "nftables: chain outbound" in " ".join(listed)
        assert engine.remove().removed == listed
        assert engine.remove().removed == ()
        assert run(["nft", "list", "ruleset"]).stdout == before


def test_what_is_previewed_is_what_the_kernel_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with bare_namespace() as space, space.inside():
        engine = load()
        given: list[str] = []
        real = engine.nft.execute

        def execute(text: str) -> None:
            given.append(text)
            real(text)

        monkeypatch.setattr(engine.nft, "execute", execute)
        for policy in (Policy(PROXY), EVERYTHING, Policy(PROXY)):
            previewed = engine.preview(policy)
            engine.apply(engine.plan(policy))
            assert "".join(given) == without_comments(previewed)
            assert not any("chain" in text for text in given[:-1])  # whatever acts on packets is one transaction
            assert "elements" not in given[-1]  # and looks into sets that were filled before
            again = engine.plan(policy).transactions(nft.held(engine.nft, engine.where))
            assert not any("set " in text for text in again[:1])
            given.clear()


def test_both_ways_give_the_same_listing() -> None:
    library, program = ways()
    assert isinstance(library, LibraryNft)
    with bare_namespace() as space, space.inside():
        engine = NftablesEngine(library, EngineOptions(comments=False))
        engine.apply(engine.plan(EVERYTHING))
        command = "list table inet tpctl"
        assert library.listing(command) == program.listing(command)
        assert library.objects(command) == program.objects(command)
        assert "comment" not in program.listing(command)


def test_drift_is_seen_where_no_namespace_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(way: Nft, text: str, where: str) -> str:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(scratch, "_listed_elsewhere", refuse)
    with bare_namespace() as space, space.inside():
        engine = load()
        plan = engine.plan(EVERYTHING)
        engine.apply(plan)
        before = run(["nft", "list", "ruleset"]).stdout
        assert engine.inspect(plan).drift == ()
        run(["nft", "add", "table", "inet", "tpctl_scratch"])
        run(["nft", "flush", "chain", "inet", "tpctl", "inbound"])
        assert any("goto inbound_listener" in line for line in engine.inspect(plan).drift)
        engine.apply(plan)
        assert run(["nft", "--stateless", "list", "table", "inet", "tpctl"]).stdout.count("\n") == before.count("\n")
        assert "scratch" not in run(["nft", "list", "tables"]).stdout


def test_invalid_packets_are_dropped_only_in_the_families_of_the_policy() -> None:
    """A segment with a wrong checksum is invalid to conntrack."""
    policy = Policy(PROXY, drop_invalid=True, families=frozenset({Family.IPV4}))
    with Lab(stage(policy).layout) as lab:
        with lab.inside(HOST):
            engine = load()
            engine.apply(engine.plan(policy))
        with lab.inside(PEER):
            for family in Family:
                with socket.socket(AF[family], socket.SOCK_RAW, socket.IPPROTO_TCP) as sender:
                    segment = struct.pack("!HHIIBBHHH", 1234, 8080, 1, 0, 0x50, 0x02, 1024, 0xDEAD, 0)
                    sender.sendto(segment, (str(HOST_ADDRESS[family]), 0))
                # What was sent before has arrived when this has.
                later = lab.layout.arriving(PEER_ADDRESS[family], HOST_ADDRESS[family], "tcp", 9)
                assert lab.dial(later).outcome == "refused"
        with lab.inside(HOST):
            counted = {counter.rule: counter.packets for counter in engine.inspect(None).counters}
    assert counted["tpctl/i1: invalid packets are dropped"] == 1
    assert counted[f"tpctl/i0: new connections to this host {SIGNATURE}"] == 1, "of IPv4, the one that was dialled"


@pytest.mark.parametrize("module", [SimpleNamespace(Nftables=object), SimpleNamespace()])  # Debian 11's; another one
def test_a_python_module_without_dry_runs_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace
) -> None:
    monkeypatch.setitem(sys.modules, "nftables", module)
    assert isinstance(nft.find(), ProgramNft)


def test_an_nft_that_forgets_sets_is_given_one_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nft 0.9.8 knows only the sets of the text it reads."""
    program = tmp_path / "nft"
    program.write_text("#!/bin/sh\necho 'nftables v0.9.8 (E.D.S.)'\n")
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "nftables", None)
    with monkeypatch.context() as patched:
        patched.setattr("tpctl.system.runner.ENVIRONMENT", {"PATH": str(tmp_path)})
        patched.setenv("PATH", str(tmp_path))
        way = nft.find()
    given: list[str] = []
    with bare_namespace() as space, space.inside():
        real = way.execute

        def execute(text: str) -> None:
            given.append(text)
            real(text)

        monkeypatch.setattr(way, "execute", execute)
        engine = NftablesEngine(way, EngineOptions())
        plan = engine.plan(EVERYTHING)
        engine.apply(plan)
        assert len(given) == 1
        assert engine.inspect(plan).drift == ()
    assert nft.find().knows_sets


def test_the_program_is_used_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nftables", None)
    assert isinstance(nft.find(), ProgramNft)
    monkeypatch.setattr("tpctl.system.runner.ENVIRONMENT", {"PATH": "/nonexistent"})
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="python3-nftables"):
        nft.find()


def test_what_the_kernel_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ProgramNft, text: str) -> None:
        raise NftError("Could not process rule: Operation not supported")

    monkeypatch.setattr(ProgramNft, "check", refuse)
    with pytest.raises(HostError, match=r"nft says .*not supported.*use --engine iptables instead"):
        probe.require(ProgramNft())


def test_both_ways_count_the_same_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    with scene() as (lab, _):
        with lab.inside("host"):
            engine = load()
            engine.apply(engine.plan(Policy(PROXY)))
        with lab.inside("host", APP):
            through = [dial(family) for family in REMOTES]
            assert [who(connection) for connection in through] == ["P", "P"]
        with lab.inside("host"):
            assert drain.running((15001,)) == 2
            monkeypatch.setattr(conntrack, "LISTING", "nonexistent")
            assert drain.running((15001,)) == 2
            assert drain.running((15006,)) == 0
            through[0].close()
            assert drain.running((15001,)) == 1
            through[1].close()


@pytest.mark.parametrize("name", ["br0", "odd*", "b*c", "a.b-c_d@e", "wild+", "#x", "$y", "in", "ü"])
def test_interface_names_mean_what_they_say(name: str) -> None:
    """Packets are counted on an interface of that name, and not on one of another."""
    real = name.replace("wild+", "wild7")
    with bare_namespace() as space, space.inside():
        for number, link in enumerate((real, "zzz")):
            run(["ip", "link", "add", link, "type", "veth", "peer", "name", f"far{number}"])
            for end in (link, f"far{number}"):
                run(["ip", "link", "set", "dev", end, "up"])
            run(["ip", "address", "add", f"10.{number}.0.1/24", "dev", link])
            run(["ip", "neighbour", "add", f"10.{number}.0.2", "lladdr", "02:00:00:00:00:01", "dev", link])
        rule = f"oifname {interface(name)} ip protocol udp counter"
        chain = f"chain c {{ type filter hook output priority 0; {rule}; }}"
        nft.find().execute(f"table inet t {{ {chain}; }}\n")
        for number in (0, 1):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"x", (f"10.{number}.0.2", 9))
        assert "counter packets 1 " in run(["nft", "list", "ruleset"]).stdout


class WithoutNat(ProgramNft):
    """The nft program with a kernel that has REDIRECT, but no module nft_nat."""

    def execute(self, text: str) -> None:
        self._judge(text)
        super().execute(text)

    def check(self, text: str) -> None:
        self._judge(text)
        super().check(text)

    @staticmethod
    def _judge(text: str) -> None:
        if re.search(r"counter [ds]nat ", text):
            raise NftError("Could not process rule: No such file or directory")


def test_without_the_module_for_nat_it_is_redirected_and_said() -> None:
    with bare_namespace() as space, space.inside():
        way = WithoutNat()
        engine = NftablesEngine(way, EngineOptions(), kernel=probe.require(way))
        plan = engine.plan(EVERYTHING)
        assert engine.apply(plan).notices == (REDIRECTING,)
        assert engine.inspect(plan).drift == ()
        assert "redirect to :15006" in engine.nft.listing("list table inet tpctl")

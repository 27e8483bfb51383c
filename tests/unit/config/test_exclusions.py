"""--exclude-outbound-marks and --exclude-interfaces: what is read, what is refused, and which engine cannot do it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.unit.config.resolving import FakeHost, problems, resolved
from tpctl.cli.printing.print_config import as_yaml
from tpctl.config import traffic
from tpctl.config.load import load
from tpctl.config.resolve import resolve
from tpctl.config.values import BadValueError
from tpctl.engines.ebpf.contents import contents_for
from tpctl.spec.exclusions import Interfaces, Mark
from tpctl.spec.policy import Outbound, Policy
from tpctl.system.errors import InputError


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("0x80000/0xff0000", Mark(0x80000, 0xFF0000)),
        ("524288/16711680", Mark(0x80000, 0xFF0000)),
        ("0XCA6C", Mark(51820)),
        (51820, Mark(51820)),
        ("4294967295", Mark(2**32 - 1)),
    ],
)
def test_marks_in_hexadecimal_and_decimal(raw: object, expected: Mark) -> None:
    assert traffic.read_mark(raw, pytest.fail) == expected
    assert traffic.read_mark(str(expected), pytest.fail) == expected


def test_bits_outside_the_mask_are_cleared_with_a_note() -> None:
    notes: list[str] = []
    assert traffic.read_mark("0x80001/0xff0000", notes.append) == Mark(0x80000, 0xFF0000)
    assert notes == ['"0x80001/0xff0000" has bits outside its mask; taken as 0x80000/0xff0000']


@pytest.mark.parametrize(
    "raw",
    ["", "x", "0x", "-1", "0x1/", "/0x1", "0x1/0x1/0x1", "010", "0x100000000", "4294967296", "1/0x1ffffffff", None,
     True, 1.5],
)  # fmt: skip
def test_what_is_no_mark(raw: object) -> None:
    with pytest.raises(BadValueError, match=r"is not a mark of at most 32 bits, such as 0x80000/0xff0000 or 51820"):
        traffic.read_mark(raw, pytest.fail)


@pytest.mark.parametrize("raw", ["0", "0x0", 0, "0x0/0xff", "0x100/0xff", "5/0"])
def test_a_mark_that_everybody_has_is_refused(raw: object) -> None:
    with pytest.raises(BadValueError, match="would exclude every connection without a mark"):
        traffic.read_mark(raw, pytest.fail)


@pytest.mark.parametrize(
    "raw", ["+", "a b", "a/b", "wg+0", "wg++", ".", 'a"b', "sixteen-letters0", "fifteen-letters+", 5, None]
)
def test_what_is_no_interface(raw: object) -> None:
    with pytest.raises(BadValueError, match=r"interface|longer than 15 characters"):
        traffic.read_interfaces([raw], pytest.fail)


def test_lists_repetitions_and_other_sources(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("redirect: {excludeInterfaces: [tun0, wg+], outbound: {excludeMarks: [0x10, 0x20/0xf0]}}\n")
    variables = {
        "TPCTL_REDIRECT_EXCLUDE_INTERFACES": "tun0, wg+",
        "TPCTL_REDIRECT_OUTBOUND_EXCLUDE_MARKS": "16,0x20/0xf0",
    }
    flags = {"exclude_interfaces": ["tun0", "wg+,tun0"], "outbound_exclude_marks": ["16", "0x20/0xf0"]}
    for config in (load(files=[str(file)]), load(environ=variables), load(flags=flags)):
        assert config.exclude_interfaces == (Interfaces("tun0"), Interfaces("wg+"))
        assert config.outbound_exclude_marks == (Mark(0x10), Mark(0x20, 0xF0))


def test_marks_that_the_host_keeps_out_of_a_tunnel() -> None:
    host = FakeHost(marks=(Mark(0x80000, 0xFF0000),))
    for flags in ({}, {"outbound_exclude_marks": "auto"}):
        result = resolved(host, **flags)
        assert result.policy.outbound.exclude_marks == host.marks
        (notice,) = result.notices
        assert notice.startswith("warning: this host routes connections with the mark 0x80000/0xff0000 apart")
        assert notice.endswith("they are not redirected; --exclude-outbound-marks none redirects them")
    for given, expected in (("none", ()), ("0x10", (Mark(0x10),))):
        result = resolved(host, outbound_exclude_marks=given)
        assert result.policy.outbound.exclude_marks == expected
        assert result.notices[0].endswith("0x80000/0xff0000 is not excluded")
    assert not resolved(host, outbound_exclude_marks="0x80000/0xff0000").notices


@pytest.mark.parametrize("value", ["auto", "none", "0x10,0x20/0xf0"])
def test_a_printed_list_of_marks_comes_to_the_same(tmp_path: Path, value: str) -> None:
    printed = tmp_path / "config.yaml"
    printed.write_text(as_yaml(load(flags={"outbound_exclude_marks": [value]})))
    host = FakeHost(marks=(Mark(7),))
    assert resolve(load(files=[str(printed)]), host).policy == resolved(host, outbound_exclude_marks=value).policy


@pytest.mark.parametrize("pattern", ["lo", "l+"])
def test_loopback_cannot_be_excluded(pattern: str) -> None:
    (problem,) = problems(exclude_interfaces=f"tun0,{pattern}")
    assert problem == (
        f"flag --exclude-interfaces: {pattern} is or includes lo, over which redirected connections reach the data "
        "plane; name the others"
    )


def test_a_virtual_network_of_which_nothing_is_left_contradicts() -> None:
    for vnet, excluded in (("br+", "br+"), ("br-1", "br+"), ("br-1", "br-1"), ("br1+", "br+")):
        with pytest.raises(InputError) as caught:
            load(flags={"virtual_networks": [f"{vnet}:10.0.0.0/8"], "exclude_interfaces": [excluded]})
        assert caught.value.problems == (
            f"flag --vnet: {vnet}:10.0.0.0/8 is on an interface that flag --exclude-interfaces ({excluded}) leaves "
            "alone; drop one of the two",
        )
    assert resolved(virtual_networks="br+:10.0.0.0/8", exclude_interfaces="br-dmz").policy.exclude_interfaces


def test_the_ebpf_engine_refuses_interfaces_and_too_many_marks() -> None:
    with pytest.raises(InputError, match=r"--exclude-interfaces: eBPF .* use --engine nftables or --engine iptables"):
        contents_for(Policy(5678, exclude_interfaces=(Interfaces("tun0"),)))
    marks = tuple(Mark(number) for number in range(1, 34))
    (packed,) = contents_for(Policy(5678, outbound=Outbound(exclude_marks=marks[:32]))).marks.values()
    assert packed == b"".join(struct.pack("=II", number, 2**32 - 1) for number in range(1, 33))
    with pytest.raises(InputError, match="--exclude-outbound-marks: 33 marks"):
        contents_for(Policy(5678, outbound=Outbound(exclude_marks=marks)))

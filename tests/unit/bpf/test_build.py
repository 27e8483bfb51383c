"""The cache of compiled programs, and what the C text and the Python text must agree on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tpctl.bpf import build as module
from tpctl.bpf.build import SOURCES, Build, sources
from tpctl.bpf.programs import MAPS, PROGRAMS
from tpctl.bpf.syscall import Shape
from tpctl.engines.ebpf.contents import _FLAGS
from tpctl.engines.ebpf.counters import RULES, possible_cpus
from tpctl.engines.ebpf.listeners import SLOTS

_LOAD_MAP = bytes((0x18, 0x11))
"""Load a 64-bit number into register 1; its source is a map's descriptor."""


def built(code: bytes = bytes(8)) -> Build:
    return Build({program.name: code for program in PROGRAMS}, {name: Shape(1, 4, 8, 2, 0) for name in MAPS})


def text() -> str:
    return "\n".join((sources() / name).read_text() for name in SOURCES)


def test_maps_are_put_in_by_position() -> None:
    code = _LOAD_MAP + bytes(2) + (3).to_bytes(4, "little") + bytes(8) + b"\x95" + bytes(7)
    maps = {name: 100 + number for number, name in enumerate(MAPS)}
    patched = built(code).with_maps("connect4", maps)
    assert int.from_bytes(patched[4:8], "little") == 103
    assert patched[8:] == code[8:]


def test_a_build_survives_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "ebpf-1.json"
    module._keep(file, built(b"12345678"))
    if os.geteuid() != 0:
        assert module._cached(file) is None
        return
    assert module._cached(file) == built(b"12345678")


def test_older_builds_go(tmp_path: Path) -> None:
    for name in ("ebpf-1.json", "ebpf-2.json"):
        module._keep(tmp_path / name, built())
    assert [path.name for path in tmp_path.iterdir()] == ["ebpf-2.json"]


def test_what_a_killed_one_was_writing_goes(tmp_path: Path) -> None:
    (tmp_path / ".ebpf-abc").write_text("{")
    module._keep(tmp_path / "ebpf-1.json", built())
    assert [path.name for path in tmp_path.iterdir()] == ["ebpf-1.json"]


def test_a_build_that_cannot_be_kept_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "ebpf-1.json").mkdir()  # nothing can be renamed to that
    module._keep(tmp_path / "ebpf-1.json", built())
    assert [path.name for path in tmp_path.iterdir()] == ["ebpf-1.json"]


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"instructions": {"connect4": 1}}'])
def test_a_damaged_cache_is_no_cache(tmp_path: Path, damage: str) -> None:
    (tmp_path / "ebpf-1.json").write_text(damage)
    assert module._cached(tmp_path / "ebpf-1.json") is None


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_others_could_have_written_is_not_loaded(tmp_path: Path, which: str) -> None:
    file = tmp_path / "ebpf-1.json"
    module._keep(file, built())
    (file if which == "file" else tmp_path).chmod(0o777)
    assert module._cached(file) is None


def test_an_unwritable_cache_does_no_harm() -> None:
    module._keep(Path("/proc/no-such-folder/ebpf-1.json"), built())


def test_rules_are_in_the_order_of_the_c_text() -> None:
    (body,) = re.findall(r"enum rule \{(.*?)\}", text(), re.DOTALL)
    names = list(re.findall(r"RULE_(\w+)", body))
    assert len(names) == len(RULES)
    for name, (direction, words) in zip(names[1:], RULES[1:], strict=True):
        if name.startswith(("BYPASSED", "REFUSED")):
            assert words.startswith(name.split("_")[0].lower())
            assert direction == name.split("_")[1].lower()
        else:
            assert words.startswith(name.split("_")[0].lower())


def test_flags_are_in_the_order_of_the_c_text() -> None:
    found = re.findall(r"FLAG_(\w+) = 1 << (\d+)", text())
    assert [(name.lower(), int(bit)) for name, bit in found] == [(name, bit) for bit, name in enumerate(_FLAGS)]


def test_slots_are_as_many_as_in_the_c_text() -> None:
    assert re.findall(r"#define SLOTS (\d+)", text()) == [str(SLOTS)]


def test_every_program_and_map_is_in_the_c_text() -> None:
    for program in PROGRAMS:
        assert re.search(rf"^int {program.name}\(struct ", text(), re.MULTILINE)
    for name in MAPS:
        assert re.search(rf"table_t {name} =|, {name}, ", text())


@pytest.mark.parametrize(("possible", "count"), [("0\n", 1), ("0-1\n", 2), ("0-3,8-11\n", 12)])
def test_processors_are_counted_as_the_kernel_does(possible: str, count: int) -> None:
    assert possible_cpus(possible) == count


def test_an_uninstall_forgets_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    assert module.forget() == ()
    module._keep(module.CACHE / "ebpf-1.json", built(b"12345678"))
    assert len(module.forget(dry_run=True)) == 1
    assert module.CACHE.exists()
    assert len(module.forget()) == 1
    assert not module.CACHE.exists()


GIVEN = re.compile(r"struct (?:bpf_sock|bpf_sock_addr|bpf_sock_ops|bpf_sockopt|bpf_sk_lookup|__sk_buff) \*(\w+)")
"""A pointer to what the kernel gives to a program."""


@pytest.mark.parametrize("file", sorted(path.name for path in sources().glob("*.c")))
def test_no_field_of_the_kernels_is_left_to_the_compiler(file: str) -> None:
    """It would merge, narrow or share the accesses, and each release of LLVM others."""
    text = (sources() / file).read_text()
    pointers = "|".join(sorted(set(GIVEN.findall(text)))) or "(?!)"
    assert not re.findall(rf"\b(?:{pointers})->.*", text)


def test_every_text_is_compiled() -> None:
    assert {path.name for path in sources().glob("*.c")} == {*SOURCES, "relay_sockmap.c"}

"""Memory for a change and its way back, in processes whose address space is limited."""

from __future__ import annotations

import re
import subprocess
import sys

BEGINNING = """
import mmap, resource, sys
from tpctl.change.steps import Step, carry_out
from tpctl.system import memory
from tpctl.system.errors import TpctlError

def limit(more):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))

def exhaust():
    while True:
        held.append(mmap.mmap(-1, 1 << 20))

held = []
"""
EXHAUSTED = """
def step():
    try:
        exhaust()
    except OSError as error:
        raise MemoryError from error

limit(memory.NEEDED_BYTES)
try:
    carry_out([Step("a", lambda: True, lambda done: held.append(bytearray(16 << 20))), Step("b", step)], "as before")
except TpctlError as error:
    print(error)
"""
TOO_LITTLE = """
limit(memory.NEEDED_BYTES // 2)
try:
    memory.require()
except TpctlError as error:
    print(error.exit_code, error)
"""


def said_by(program: str) -> str:
    """What a process of its own prints."""
    return subprocess.run(
        [sys.executable, "-c", BEGINNING + program], capture_output=True, text=True, timeout=120, check=True
    ).stdout.strip()


def test_a_step_that_uses_all_memory_leaves_some_for_what_undoes_the_others() -> None:
    assert said_by(EXHAUSTED) == "there is not enough memory. as before"


def test_too_little_memory_is_said_before_anything_is_touched() -> None:
    said = said_by(TOO_LITTLE)
    assert re.fullmatch(r"2 there is not enough memory: .* 64 MiB .*`ulimit -v`.*Nothing was changed", said), said


def test_with_enough_nothing_is_said() -> None:
    assert not said_by("limit(2 * memory.NEEDED_BYTES); memory.require()")


def test_what_is_set_aside_takes_address_space_and_no_memory() -> None:
    said = said_by(
        """
def kilobytes(of):
    return int(next(line for line in open("/proc/self/status") if line.startswith(of)).split()[1])

size, resident = kilobytes("VmSize"), kilobytes("VmRSS")
with memory.set_aside():
    print(kilobytes("VmSize") - size >= memory.RESERVE_BYTES >> 10, kilobytes("VmRSS") - resident < 1024)
    memory.give_back()
    memory.give_back()
    print(kilobytes("VmSize") - size < 1024)
"""
    )
    assert said.split() == ["True"] * 3

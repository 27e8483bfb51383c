"""Hostile surroundings of the compiler that makes the eBPF programs: headers, modules, programs and variables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.scene import Host
from tests.hidden import ROOT_DIRECTORY
from tests.netns.lab import PROXY_USER
from tests.netns.test_hostile_environment import FAKED, library
from tpctl.bpf.build import sources
from tpctl.rehearsal.cgroup import own_place
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, Layout

pytestmark = [pytest.mark.root, pytest.mark.needs("ebpf", "sockmap", "interception")]

STUBS = sources() / "stubs"
ARCHITECTURE = "arch/x86"
HEADERS = (
    *(str(file.relative_to(STUBS)) for file in STUBS.rglob("*.h")),
    *(str(file.relative_to(STUBS / "include")) for file in (STUBS / "include").rglob("*.h")),
    "asm/page.h", "linux/bpf.h", "linux/bpf_perf_event.h", "stdarg.h", "stddef.h", "bcc/helpers.h",
)  # fmt: skip
"""Wherever the compiler might look for them."""
MODULES = ("bcc", "libbcc", "ctypes", "sitecustomize", "table", "json", "elftools")
LIBRARIES = ("libbcc.so.0", "libbcc.so", "bcc", "libclang-cpp.so.14", "libLLVM-14.so.1", "libelf.so.1", "libbpf.so.1")
FLAGS = ("--kuma-dp-user", PROXY_USER, "--engine", "ebpf")
MADE = "cat /var/cache/tpctl/ebpf-*.json"


@pytest.fixture
def seen() -> Iterator[Path]:
    """A directory that the command sees, too: its /tmp is one of its own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def planted(seen: Path) -> Path:
    """A directory of a local user's, with everything in it that a compiler, an import or a shell might pick up."""
    folder = seen / "planted"
    for name in HEADERS:
        for place in (folder, folder / "include"):
            file = place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("#error a header of somebody else's\n")
    for name in (*FAKED, "clang", "llc", "opt", "tar", "rmmod", "xz", "ausyscall", "ptxas"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {seen}/faked\n")
        (folder / name).chmod(0o755)
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"print('{name}', file=open('{seen}/imported', 'a'))\n")
    built = library(seen, "loaded")
    for name in LIBRARIES:
        if not (folder / name).exists():
            (folder / name).symlink_to(built)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Every variable by which bcc, clang or a program that they start would be led to a directory."""
    here = str(folder)
    up = os.path.relpath("/", STUBS / "arch")
    return {
        "PATH": here, "PYTHONPATH": str(ROOT_DIRECTORY / "agent"), "TMPDIR": here, "TMP": here, "TEMP": here,
        "HOME": here, "ARCH": f"{up}{folder}", "BCC_KERNEL_SOURCE": here, "BCC_LINUX_VERSION_CODE": "5",
        "BCC_PROBE_PREFIX": "x", "BCC_KERNEL_MODULES_SUFFIX": "x", "BCC_PROBE_LIMIT": "1", "BCC_SYMFS": here,
        "BCC_DEBUGINFO_ROOT": here, "CPATH": here, "C_INCLUDE_PATH": here, "CPLUS_INCLUDE_PATH": here,
        "SDKROOT": here, "COMPILER_PATH": here, "LIBRARY_PATH": here, "GCC_EXEC_PREFIX": f"{here}/",
        "CCC_OVERRIDE_OPTIONS": f"+-I{here}", "CCC_ADD_ARGS": "x", "RC_DEBUG_OPTIONS": "1", "CC_PRINT_OPTIONS": "1",
        "CC_PRINT_OPTIONS_FILE": f"{here}/options",
        "SOURCE_DATE_EPOCH": "x", "BASH_ENV": f"{here}/sh", "ENV": f"{here}/sh", "IFS": "/", "LANG": "../../x",
    }  # fmt: skip


def test_the_programs_of_an_install_are_made_of_roots_files_only(seen: Path) -> None:
    folder = planted(seen)

    def tpctl(variables: dict[str, str], directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
        # -P: as the installed command, which does not look for its modules in the working directory.
        words = ("--mount", "--cgroup", f"--wd={directory}", sys.executable, "-P", "-m", "tpctl.cli.main", *words)
        with lab.inside(HOST):
            return subprocess.run(
                ["/usr/bin/nsenter", f"--target={host.server.pid}", *words],
                capture_output=True, text=True, check=False, env=variables, timeout=300,
            )  # fmt: skip

    hostile = {**environment(folder), "LD_PRELOAD": str(library(seen, "preloaded"))}
    clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT_DIRECTORY / "agent")}
    with own_place() as place, Lab(Layout()) as lab:
        host = Host(lab, place, seen / "host")
        try:
            made = []
            for variables, directory in ((clean, Path("/")), (clean, folder), (hostile, folder)):
                done = tpctl(variables, directory, "install", *FLAGS)
                assert done.returncode == 0, f"{done.stdout}{done.stderr}"
                made.append(host.shell(MADE).out)
                status = tpctl(variables, directory, "status")
                assert re.search(r"drift +none", status.stdout), f"{status.stdout}{status.stderr}"
                assert tpctl(variables, directory, "uninstall").returncode == 0
                host.shell("rm -rf /var/cache/tpctl")
        finally:
            host.close()
    assert made[0]
    assert made[1] == made[0], "the working directory changes the programs"
    assert made[2] == made[0], "the environment changes the programs"
    started = {Path(name).name for name in (seen / "preloaded").read_text().split()}
    assert {name for name in started if not name.startswith(("python", "nsenter"))} == set()
    assert_nothing_was_run(seen)


def test_the_program_of_a_relay_is_made_of_roots_files_only(seen: Path) -> None:
    folder = planted(seen)
    code = "from tpctl.relay.connections import sockmap; print(len(sockmap.load(64)))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True, text=True, check=False, env=environment(folder), cwd=folder, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stderr == ""
    assert_nothing_was_run(seen)


def assert_nothing_was_run(seen: Path) -> None:
    assert {witness for witness in ("faked", "imported", "loaded") if (seen / witness).exists()} == set()
    assert not (seen / "planted/options").exists()

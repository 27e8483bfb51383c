"""On a kernel that refuses something, the tests that need it are skipped with the kernel's answer, and none fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.hidden import ROOT_DIRECTORY

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("refused", "chosen", "said"),
    [
        (
            "namespaces",
            "tests/netns/test_verify.py -k comes_back",
            "no namespaces here: unshare: ",
        ),
        ("legacy", "tests/equivalence/test_engines.py -k agrees and legacy", "no legacy here: iptables-legacy: "),
        ("bpf", "tests/netns/engines/test_ebpf_engine.py -k removed_twice or refused", "no ebpf here: "),
        ("bpf", "tests/netns/relay/test_sockmap.py", "no sockmap here: "),
    ],
)
def test_what_the_kernel_refuses_is_no_failure(refused: str, chosen: str, said: str) -> None:
    file, _, words = chosen.partition(" -k ")
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, "-k", words]
    argv = [sys.executable, "-m", "tests.without", refused, "--", *pytest_]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT_DIRECTORY, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f": {said}" in done.stdout
    assert " skipped" in done.stdout.splitlines()[-1]
    assert " passed" not in done.stdout.splitlines()[-1]

"""Process 1 has mounts and rights of its own, as under `ip netns exec` or in a service with fewer capabilities."""

from __future__ import annotations

import sys

import pytest

from tests.netns.lab import PROXY_USER, bare_namespace, run

pytestmark = pytest.mark.root

FEWER_RIGHTS = r"""
    mount --make-rprivate /
    while umount /sys/fs/bpf 2>/dev/null; do :; done
    mount -t bpf bpf /sys/fs/bpf
    setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace \
        unshare --mount sh -c 'umount /sys/fs/bpf; exec "$@"' sh "$@"
    exit $?  # this shell is process 1, and shall not become the command
"""
"""The BPF file system is mounted where process 1 is, and may be seen there, but not entered."""


def beside_process_1(*words: str) -> tuple[int, str]:
    """Run tpctl there: its exit code, and what it said."""
    argv = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", FEWER_RIGHTS, "sh"]
    done = run([*argv, sys.executable, "-m", "tpctl.cli.main", *words], check=False)
    return done.returncode, done.stdout + done.stderr


def test_engines_other_than_ebpf_do_not_need_its_file_system() -> None:
    install = "install", "--kuma-dp-user", PROXY_USER
    with bare_namespace() as space, space.inside():
        code, said = beside_process_1(*install, "--engine", "ebpf", "--dry-run")
        assert code == 2, said
        assert "the BPF file system /sys/fs/bpf of this host is out of reach (/proc/1/root/sys/fs/bpf: Perm" in said
        code, said = beside_process_1(*install, "--engine", "nftables")
        assert code == 0, said
        assert '"engine": "nftables"' in beside_process_1("status", "--json")[1]
        code, said = beside_process_1("uninstall")
        assert code == 0, said
        assert "inet tpctl" not in run(["nft", "list", "tables"]).stdout

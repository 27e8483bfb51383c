"""A host to be hurt: two policies, connections that tell them apart, and everything that can be left behind.

The command runs in mount and control group namespaces of its own: /run, /tmp and what is mounted as the root of cgroup2
belong to the scene, and of the machine's own mounts nothing is to be seen, even by way of process 1. So an eBPF program
reaches only sockets of this process, and no lock is shared with anybody.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

from tests.crash.server import Fault
from tests.hidden import ROOT_DIRECTORY, hide
from tests.netns.lab import APP, PROXY, PROXY_USER, run, snapshot
from tpctl.record import state
from tpctl.rehearsal.cgroup import OwnPlace
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST, HOST_ADDRESS, Layout, seat
from tpctl.rehearsal.rehearse import expectation
from tpctl.spec.connection import Connection
from tpctl.spec.decide import decide
from tpctl.spec.document import from_document
from tpctl.spec.policy import Family, Policy

PROXY_FLAGS = ("--kuma-dp-user", PROXY_USER)
OLD = ("install", *PROXY_FLAGS, "--exclude-inbound-ports", "22,7001", "--exclude-outbound-ports", "22,7002")
NEW = ("install", *PROXY_FLAGS, "--exclude-inbound-ports", "22,7003", "--exclude-outbound-ports", "22,7004",
       "--redirect-all-dns-traffic", "--drop-invalid-packets")  # fmt: skip
NOT_COMPILED = "ebpf, not compiled"
"""Begins without the cache of compiled programs."""
FLAVOURS: Mapping[str, tuple[str, ...]] = {
    "nftables": ("--engine", "nftables"),
    "iptables nft": ("--engine", "iptables", "--iptables-mode", "nft"),
    "iptables legacy": ("--engine", "iptables", "--iptables-mode", "legacy"),
    "ebpf": ("--engine", "ebpf"),
    NOT_COMPILED: ("--engine", "ebpf"),
    "iptables nft, firewalld": ("--engine", "iptables", "--iptables-mode", "nft", "--store-firewalld"),
    "iptables legacy, firewalld": ("--engine", "iptables", "--iptables-mode", "legacy", "--store-firewalld"),
}
_SETTING = f"""
set -e
mount --make-rprivate /
for mounted in $(awk '$3 == "cgroup2" {{ print $2 }}' /proc/self/mounts); do umount -l "$mounted"; done
mount --bind "$1/firewalld" /etc/firewalld
mount --bind "$1/pins" /sys/fs/bpf
{hide("/run")}
mkdir /run/cgroup
mount -t cgroup2 none /run/cgroup
{hide("/tmp", "mode=1777")}
{hide("/var/cache")}
touch /run/nothing
mount --bind /run/nothing /proc/1/mountinfo
eval "$2"
exec "$3" -m tests.crash.server
"""
_REMOTE = {Family.IPV4: ip_address("203.0.113.7"), Family.IPV6: ip_address("2001:db8:7::7")}
_FOREIGN = "table inet site { chain watch { type filter hook output priority 7; udp dport 9 counter accept; }; }"


@dataclass(frozen=True, slots=True)
class Done:
    """A run of the command."""

    exit: int
    out: str
    err: str
    points: tuple[str, ...]
    hit: str | None
    """The point of the last fault; None when the run was over before."""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """From the server's answer."""
        return cls(answer["exit"], answer["out"], answer["err"], tuple(answer["points"]), answer["hit"])

    def __str__(self) -> str:
        return f"exit {self.exit}\n{self.out}{self.err}"


class Host:
    """Runs the command in a setting of its own; `prepare` is shell that completes the setting, as root."""

    def __init__(self, lab: Lab, place: OwnPlace, folder: Path, prepare: str = "") -> None:
        self.lab = lab
        folder.mkdir(exist_ok=True)
        (folder / "pins").mkdir(exist_ok=True)
        (folder / "firewalld").mkdir(exist_ok=True)
        if not (folder / "firewalld" / "firewalld.conf").exists():
            (folder / "firewalld" / "firewalld.conf").write_text("DefaultZone=public\nFirewallBackend=iptables\n")
        self.folder = folder
        run(["mount", "--bind", str(place.pins), str(folder / "pins")])
        try:
            with lab.inside(HOST):
                self.server = subprocess.Popen(
                    ["unshare", "--cgroup", "--mount", "sh", "-c", _SETTING, "sh", folder, prepare, sys.executable],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT_DIRECTORY,
                )  # fmt: skip
            assert self.server.stdout
            assert self.server.stdout.readline() == "ready\n"
        finally:
            run(["umount", str(folder / "pins")])

    def close(self) -> None:
        """End it, with its mounts."""
        for stream in (self.server.stdin, self.server.stdout):
            if stream:
                stream.close()
        self.server.wait(timeout=300)

    def __call__(
        self, *argv: str, faults: Sequence[Fault] = (), patience: float | None = None, forgetting: bool = False
    ) -> Done:
        """Run the command with these faults; it waits for what it starts for `patience` seconds only.

        With `forgetting` each connection that conntrack is told to forget is a point, too.
        """
        request = {"argv": argv, "faults": faults, "patience": patience, "forgetting": forgetting}
        return Done.of(self._ask(request))

    def leave(self, seconds: float) -> list[str]:
        """Wait until every guardian has ended; hands back those that had to be killed."""
        found: list[str] = self._ask({"leave": seconds})["left"]
        return found

    def shell(self, script: str, *, check: bool = True) -> Done:
        """Run a script beside the command, in its namespaces."""
        done = Done.of(self._ask({"shell": script}))
        assert not check or done.exit == 0, f"{script}: {done}"
        return done

    def beside(self) -> list[str]:
        """What to put before a program to start it from inside the host's network namespace, beside the command."""
        return ["nsenter", f"--target={self.server.pid}", "--mount", "--cgroup", f"--wd={ROOT_DIRECTORY}"]

    def ok(self, *argv: str) -> Done:
        """Run the command, which must succeed."""
        done = self(*argv)
        assert done.exit == 0, f"{argv}: {done}"
        return done

    def files(self, *roots: str) -> dict[str, str]:
        """What lies below some directories."""
        found: dict[str, str] = self._ask({"list": roots})
        return found

    def write(self, path: str, text: str) -> None:
        """Write a file as the command would see it, with the folder it is in."""
        self._ask({"write": path, "text": text})

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self.server.stdin
        assert self.server.stdout
        print(json.dumps(request), file=self.server.stdin, flush=True)
        answer = self.server.stdout.readline()
        assert answer, "the server of the scene has ended"
        found: dict[str, Any] = json.loads(answer)
        return found


class Scene:
    """A host in a laboratory, with other software's rules on it."""

    def __init__(self, lab: Lab, host: Host, flavour: str) -> None:
        self.lab = lab
        self.host = host
        self.flags = FLAVOURS[flavour]
        self.flavour = flavour
        self.policies: dict[str, Policy | None] = {"none": None}
        self._seed()
        for name in ("old", "new"):
            self.install(name)
            self.policies[name] = from_document(json.loads(host("status", "--json").out)["policy"])
        self.uninstall()
        lab.serve_data_plane(Policy(PROXY))
        self.connections = dict(_connections(lab.layout))
        for connection in self.connections.values():
            lab.serve(connection)
        self.base = self.held()
        for name in ("old", "new"):
            self.install(name)
            assert self.seen() == self.expected(name), (flavour, name)
        self.uninstall()
        assert self.seen() == self.expected("none")
        assert self.held() == self.base

    def argv(self, name: str) -> tuple[str, ...]:
        """The command that installs one of the policies."""
        return (*(OLD if name == "old" else NEW), *self.flags)

    def install(self, name: str) -> None:
        """Install one of the policies, undisturbed."""
        self.host.ok(*self.argv(name))

    def uninstall(self) -> None:
        """Uninstall, undisturbed."""
        self.host.ok("uninstall")

    def seen(self) -> dict[str, str]:
        """Where every connection ends now."""
        return {name: str(self.lab.dial(one)) for name, one in self.connections.items()}

    def expected(self, name: str) -> dict[str, str]:
        """Where they should end under a policy."""
        policy = self.policies[name]
        if policy is None:
            return {label: ":".join(map(str, seat(self.lab.layout, one))) for label, one in self.connections.items()}
        return {
            label: str(expectation(self.lab.layout, decide(policy, one), one))
            for label, one in self.connections.items()
        }

    def held(self) -> dict[str, str]:
        """Everything that a command could leave behind, in the kernel and in files."""
        with self.lab.inside(HOST):
            kernel = {**snapshot(counters=False), **_routes()}
        files = self.host.files("/run", "/tmp", "/sys/fs/bpf", "/etc/firewalld")
        return {**kernel, **{path: text for path, text in files.items() if _counts(path)}}

    def lose_rules(self) -> None:
        """Take the rules away behind the record's back, as another program would."""
        record = next(text for path, text in self.host.files("/run/tpctl").items() if path.endswith("/state.json"))
        key = Path(next(path for path in self.host.files("/run/tpctl") if path.endswith("/state.json"))).parent.name
        self.uninstall()
        self.host.write(f"/run/tpctl/{key}/state.json", record)

    def is_pending(self) -> bool:
        """Whether a change awaits its confirmation."""
        return any(path.endswith("/pending.json") for path in self.host.files("/run/tpctl"))

    def let_time_pass(self) -> None:
        """As if the time of the change that awaits confirmation, if there is one, had been up for an hour."""
        for path, text in self.host.files("/run/tpctl").items():
            if path.endswith("/pending.json"):
                document = json.loads(text)
                past = document["deadline"] - document["seconds"] - 3600
                self.host.write(path, json.dumps({**document, "deadline": past}))

    def forget(self) -> None:
        """Without the cache of compiled programs, if that is the flavour."""
        if self.flavour == NOT_COMPILED:
            self.host.shell("rm -rf /var/cache/tpctl")

    def litter(self) -> list[str]:
        """Files that only a killed command can have left, beside what is installed."""
        paths = self.host.files("/run/tpctl", "/tmp", "/etc/firewalld", "/var/cache")
        ours = [path for path in paths if path.rpartition("/")[2].startswith((".", "tpctl-"))]
        return [f"litter: {path}" for path in ours]

    def mend(self, held: Mapping[str, str]) -> None:
        """After a failed trial: accept what cannot be removed, so that the next trial is judged by itself."""
        self.base = dict(held)

    def complaints(self) -> list[str]:
        """What `tpctl status` finds wrong."""
        found = json.loads(self.host("status", "--json").out)
        return [*found["problems"], *found["drift"]]

    def _seed(self) -> None:
        """Rules of other software in every table that tpctl touches, in both variants and with nft."""
        with self.lab.inside(HOST):
            for tool in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"):
                for table, chain in (("nat", "OUTPUT"), ("nat", "PREROUTING"), ("raw", "OUTPUT"),
                                     ("raw", "PREROUTING"), ("mangle", "PREROUTING"), ("filter", "INPUT"),
                                     ("filter", "OUTPUT")):  # fmt: skip
                    run([tool, "-t", table, "-A", chain, "-p", "udp", "--dport", "9", "-j", "ACCEPT"])
            run(["nft", "-f", "-"], stdin=_FOREIGN)


@contextlib.contextmanager
def scene(flavour: str, place: OwnPlace, folder: Path) -> Iterator[Scene]:
    """A scene for the block."""
    with Lab(Layout()) as lab:
        host = Host(lab, place, folder)
        try:
            yield Scene(lab, host, flavour)
        finally:
            host.close()


def _routes() -> dict[str, str]:
    """Routing rules and routes of all tables in the current namespace, by the command that shows them."""
    asked = (
        ("ip", version, *what) for version in ("-4", "-6") for what in (("rule",), ("route", "show", "table", "all"))
    )
    return {" ".join(argv): run(argv).stdout for argv in asked}


def _counts(path: str) -> bool:
    """Locks stay behind where they are other programs' too, and the control groups are the kernel's.

    That a change was taken back is told until the next one.
    """
    if path.endswith(state.TRACE):
        return False
    return not path.startswith(("/run/cgroup", "/run/mount", "/run/xtables.lock", "/run/ebtables.lock"))


def _connections(layout: Layout) -> Iterator[tuple[str, Connection]]:
    for family in Family:
        remote, own, v = _REMOTE[family], HOST_ADDRESS[family], f"IPv{family}"
        for port in (22, 7001, 7003, 8080):
            yield f"{v} arriving at {port}", layout.arriving(remote, own, "tcp", port)
        for port in (22, 7002, 7004, 8080):
            yield f"{v} an application's to {port}", layout.outgoing("tcp", remote, port, APP)
        yield f"{v} the data plane's", layout.outgoing("tcp", remote, 8080, PROXY)
        yield f"{v} the data plane's to its own host", layout.outgoing("tcp", own, 8080, PROXY)
        yield f"{v} an application's query", layout.outgoing("udp", remote, 53, APP)
        yield f"{v} the data plane's query", layout.outgoing("udp", remote, 53, PROXY)

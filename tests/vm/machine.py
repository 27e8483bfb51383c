"""A virtual machine that runs one of the images, without KVM, and is driven over ssh like any other host."""

from __future__ import annotations

import contextlib
import json
import random
import shlex
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from tests.vm.images import Image
from tests.vm.initramfs import archive

HOST = "10.0.2.2"
"""The machine that runs this one, as seen from inside (qemu's user network)."""
PATIENCE_SECONDS = 1800.0
"""The processor is emulated, and its owner may be busy: then a boot takes more than ten minutes."""
_CPU = "Nehalem,-cx16"
"""Emulated faster than younger processors (a boot takes a sixth less). Without CMPXCHG16B, whose emulation in qemu 7.2
corrupts the flags: Linux 6.12, which allocates memory with it, dies of that within a minute."""
_MEMORY = "1G"
_SETTINGS = (
    "console=ttyS0 quiet panic=-1 mitigations=off audit=0 systemd.show_status=no "
    # What takes long is not therefore stuck: neither a service that starts nor a processor.
    "systemd.default_timeout_start_sec=900 nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
)
_PORTS = (20000, 32768)
_CAPTURED_BYTES = 96
"""Of each packet: Ethernet's, IP's and TCP's headers with their options."""
_PRIVATE = stat.S_IFREG | 0o600


class Session:
    """An interactive ssh session with a connection of its own, which answers what it is sent."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert self.is_alive()

    def is_alive(self) -> bool:
        """Whether a line comes back."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write("echo still here\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return self.process.stdout.readline() == "still here\n"

    def send(self, command: str) -> None:
        """Have the session's shell run a command, without waiting for it."""
        assert self.process.stdin
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def cut(self) -> None:
        """What a lost network does: no goodbye."""
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream:
                    stream.close()


class Machine:
    """A running machine. Its disk is a copy-on-write layer that goes when it stops. Use as a context manager.

    `folder` is for what belongs to this run: a key, sockets, the console's output.
    """

    def __init__(self, image: Image, folder: Path, *, ports: tuple[int, ...] = ()) -> None:
        self.image = image
        self.folder = folder
        self.forwarded = {port: _free_port() for port in (22, *ports)}
        """Ports of the machine, and where on this host's 127.0.0.1 they are reached."""
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: list[Session] = []
        self._ssh_options = [
            "-i", str(folder / "key"), "-o", f"Port={self.forwarded[22]}", "-o", "StrictHostKeyChecking=no",
            "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes",
            "-o", "ConnectTimeout=60", "-o", "ServerAliveInterval=30",
        ]  # fmt: skip
        self._shared = ["-o", f"ControlPath={folder}/control", "-o", "ControlMaster=auto", "-o", "ControlPersist=600"]

    def __enter__(self) -> Self:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key")], check=True)
        key = (self.folder / "key.pub").read_bytes()
        own = archive([], {"seed/root/.ssh/authorized_keys": (_PRIVATE, key)})
        (self.folder / "initrd").write_bytes(self.image.initrd.read_bytes() + own)
        with (self.folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._hang_up()
        self._cut_sessions()
        if self._process:
            self._process.kill()
            self._process.wait()

    @property
    def console(self) -> str:
        """What the machine said on its serial console."""
        return (self.folder / "console").read_text(errors="replace")

    @property
    def capture(self) -> Path:
        """What went through its network card since the last `go_back`: a file of pcap-savefile(5)."""
        return self.folder / "capture.pcap"

    def run(self, command: str, *, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell command as root, over a connection that such commands share."""
        return self._ssh([*self._shared], command, check=check, stdin=stdin)

    def run_anew(self, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The same over a connection of its own: it fails when nobody can log in."""
        return self._ssh(["-o", "ControlPath=none"], command, check=check)

    def session(self) -> Session:
        """An interactive session over a connection of its own."""
        words = ["ssh", *self._ssh_options, "-o", "ControlPath=none", "root@127.0.0.1", "exec bash --norc"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._sessions.append(Session(process))
        return self._sessions[-1]

    def said(self, command: str) -> str:
        """What a command prints, without the last line's end."""
        return self.run(command).stdout.strip()

    def tpctl(self, arguments: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command that is installed there."""
        return self.run(f"tpctl {arguments}", check=check)

    def status(self) -> dict[str, Any]:
        """What tpctl says of itself."""
        found: dict[str, Any] = json.loads(self.tpctl("status --json", check=False).stdout)
        return found

    def write(self, path: str, text: str) -> None:
        """Write a file, and make the directories it needs."""
        place = shlex.quote(path)
        self.run(f"mkdir -p $(dirname {place}) && cat > {place}", stdin=text)

    def copy(self, source: Path, destination: str) -> None:
        """Copy a file into the machine."""
        words = ["scp", *self._ssh_options, *self._shared, str(source), f"root@127.0.0.1:{destination}"]
        subprocess.run(words, check=True, capture_output=True, timeout=PATIENCE_SECONDS)

    def reboot(self) -> None:
        """Reboot it as an operator does, and wait until it is up again."""
        before = self.said("cat /proc/sys/kernel/random/boot_id")
        self.run("systemctl --no-block reboot", check=False)
        self._hang_up()
        self.wait_for(lambda: self._boot_id() not in ("", before), "the machine does not come back")
        self.wait_until_up()

    def wait_until_up(self) -> None:
        """Wait until ssh answers and systemd has started everything."""
        self.wait_for(lambda: bool(self._boot_id()), "ssh does not answer")
        self.run("systemctl is-system-running --wait", check=False)

    def wait_for(self, happened: Callable[[], bool], complaint: str, *, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for something; AssertionError with the machine's last words when it does not happen."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"{complaint}\n{self.console[-3000:]}"
            assert self._process is None or self._process.poll() is None, (self.folder / "qemu.log").read_text()
            time.sleep(0.3)

    def keep(self, name: str) -> None:
        """Remember the state of memory and disk, for `go_back`."""
        self._hang_up()
        self._monitor(f"savevm {name}")

    def go_back(self, name: str) -> None:
        """Make everything as it was at `keep`. Open sessions are lost."""
        self._hang_up()
        self._cut_sessions()
        self._monitor(f"loadvm {name}")
        self._monitor("object_del capture")
        self._monitor(f"object_add {self._capturing()}")

    def _capturing(self) -> str:
        return f"filter-dump,id=capture,netdev=net,file={self.capture},maxlen={_CAPTURED_BYTES}"

    def _command(self) -> list[str]:
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for there, here in self.forwarded.items())
        return [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", _CPU, "-m", _MEMORY, "-smp", "2",
            "-nodefaults", "-display", "none", "-serial", f"file:{self.folder}/console",
            "-kernel", str(self.image.kernel), "-initrd", str(self.folder / "initrd"),
            "-append", f"root=/dev/vda {_SETTINGS}",
            "-drive", f"file={self.image.disk},format=raw,if=virtio,snapshot=on",
            "-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-object", self._capturing(), "-device", "virtio-rng-pci",
            "-qmp", f"unix:{self.folder}/qmp,server=on,wait=off",
        ]  # fmt: skip

    def _ssh(
        self, options: list[str], command: str, *, check: bool, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        words = ["ssh", *self._ssh_options, *options, "root@127.0.0.1", command]
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
        if check and done.returncode:
            raise AssertionError(f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def _boot_id(self) -> str:
        """Which boot this is; nothing while ssh does not answer."""
        return self._ssh(self._shared, "cat /proc/sys/kernel/random/boot_id", check=False).stdout.strip()

    def _hang_up(self) -> None:
        """Close the shared connection."""
        words = ["ssh", *self._ssh_options, *self._shared, "-O", "exit", "root@127.0.0.1"]
        subprocess.run(words, capture_output=True, check=False)

    def _cut_sessions(self) -> None:
        while self._sessions:
            self._sessions.pop().cut()

    def _monitor(self, command: str) -> None:
        """Have qemu's monitor run a command. AssertionError with its complaint."""
        with self._qmp() as ask:
            said = ask("human-monitor-command", {"command-line": command})
        assert not said, said

    @contextlib.contextmanager
    def _qmp(self) -> Iterator[Callable[[str, dict[str, str]], str]]:
        with socket.socket(socket.AF_UNIX) as made:
            made.settimeout(PATIENCE_SECONDS)
            made.connect(str(self.folder / "qmp"))
            stream = made.makefile("rw")

            def ask(name: str, arguments: dict[str, str]) -> str:
                stream.write(json.dumps({"execute": name, "arguments": arguments}))
                stream.flush()
                for line in stream:  # events stand between
                    answer = json.loads(line)
                    if "return" in answer or "error" in answer:
                        return str(answer.get("return") or answer.get("error") or "")
                raise AssertionError("qemu has gone")

            ask("qmp_capabilities", {})
            yield ask


def _free_port() -> int:
    """One that the kernel gives to nobody who asks for any (ip(7)), before qemu has taken it."""
    while True:
        with socket.socket() as made, contextlib.suppress(OSError):
            made.bind(("127.0.0.1", random.randrange(*_PORTS)))
            return int(made.getsockname()[1])

"""The kernel's side of `--accelerate sockmap`: maps of sockets, and the program that moves bytes between them.

Made once, with privileges, before the relay gives them up. Its workers, and the processes that succeed it, have the
descriptors of the maps, with which they need none: from Linux 5.19 on, kernel.unprivileged_bpf_disabled only forbids
making maps and programs.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple, NoReturn

from tpctl.system.errors import HostError

SINCE = (6, 4)
"""The oldest release on which it is offered. It has been tried on 6.18 only."""
VARIABLE = "TPCTL_RELAY_SOCKMAP"
"""The descriptors that a successor is given, in the order of `Sockmap`."""
MOST_PAIRS = 1 << 20
USUAL_PAIRS = 1 << 16
"""Where connections are not limited."""
MAX_WAITING = 64
"""Buffers, each of up to 64 KiB, that may wait for a socket before the stream to it is taken back."""
_SOURCE = "relay_sockmap.c"
_SK_SKB, _VERDICT = 14, 38
"""BPF_PROG_TYPE_SK_SKB, BPF_SK_SKB_VERDICT (linux/bpf.h)."""
_OFFSETS = {
    "OFFSET_SOCK_USER_DATA": ("sock", "sk_user_data"),
    "OFFSET_PSOCK_QUEUE": ("sk_psock", "ingress_skb"),
    "OFFSET_QUEUE_LENGTH": ("sk_buff_head", "qlen"),
    "OFFSET_SKB_CB": ("sk_buff", "cb"),
    "OFFSET_CB_SEQ": ("tcp_skb_cb", "seq"),
    "OFFSET_TCP_COPIED_SEQ": ("tcp_sock", "copied_seq"),
}
_INSTEAD = "use --accelerate off"


class Sockmap(NamedTuple):
    """Descriptors of the maps of bpf/relay_sockmap.c. All keys are cookies (SO_COOKIE) of sockets that receive."""

    targets: int
    """Where their bytes go."""
    sources: int
    """Those whose bytes are moved."""
    streams: int
    """How much was moved, and whether that is over."""
    ended: int
    """The streams that are over and of which no process has taken notice yet."""


def pairs_for(connections: int) -> int:
    """How many pairs there must be room for; beyond that, connections are not accelerated. 0 stands for no limit."""
    return min(connections, MOST_PAIRS) or USUAL_PAIRS


def inherited(environ: MutableMapping[str, str]) -> Sockmap | None:
    """The maps that a predecessor has handed over; None without one."""
    numbers = environ.pop(VARIABLE, "").split(",")
    if len(numbers) != len(Sockmap._fields) or not all(number.isdecimal() for number in numbers):
        return None
    for number in numbers:
        os.set_inheritable(int(number), False)
    return Sockmap(*map(int, numbers))


def load(pairs: int) -> Sockmap:
    """Make the maps and load the program. Raises HostError when the kernel, bcc or privileges are missing.

    In a process of its own: the compiler would leave a hundred megabytes behind.
    """
    _require_kernel(os.uname().release)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        _answer(theirs, pairs)
    theirs.close()
    with ours:
        message, descriptors, _flags, _address = socket.recv_fds(ours, 65536, len(Sockmap._fields))
    os.waitpid(pid, 0)
    if len(descriptors) == len(Sockmap._fields):
        return Sockmap(*descriptors)
    problem = json.loads(message) if message else "the compiler has died"
    raise HostError(f"--accelerate sockmap: {problem}; {_INSTEAD}")


def _require_kernel(release: str) -> None:
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < SINCE:
        raise HostError(
            f"--accelerate sockmap: this is Linux {release}, and it needs {SINCE[0]}.{SINCE[1]} or later; {_INSTEAD}"
        )


def _answer(channel: socket.socket, pairs: int) -> NoReturn:
    """What the forked process does: send the maps' descriptors, or why there are none."""
    try:
        descriptors = _made(pairs)
        socket.send_fds(channel, [b"{}"], descriptors)
    except HostError as error:
        channel.send(json.dumps(str(error)).encode())
    except OSError as error:
        missing = "it needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
        channel.send(json.dumps(f"the kernel refuses it ({error.strerror}): {missing}").encode())
    except Exception as error:  # noqa: BLE001 - what is not sent is lost with this process
        channel.send(json.dumps(f"{type(error).__name__}: {error}").encode())
    finally:
        os._exit(0)


def _made(pairs: int) -> Sockmap:
    from tpctl.bpf import syscall
    from tpctl.bpf.build import CONTEXT, STUBS, alone, sources

    flags = [f"-D{name}={value}" for name, value in {"PAIRS": pairs, "MAX_WAITING": MAX_WAITING, **_offsets()}.items()]
    folder = sources()
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in (CONTEXT, _SOURCE))
    with alone(folder / STUBS):
        module, lib = _compiled(text, [*flags, "-Wno-everything"])
    size = lib.bpf_function_size(module.module, b"pass_on")
    code = ctypes.string_at(lib.bpf_function_start(module.module, b"pass_on"), size)
    maps = Sockmap(*(int(lib.bpf_table_fd(module.module, name.encode())) for name in Sockmap._fields))
    try:
        program = syscall.load_program(_SK_SKB, _VERDICT, "relay_sockmap", code)
    except syscall.RefusedError as refused:
        if refused.error.strerror and not refused.log:
            raise refused.error from refused
        raise HostError(f"the kernel refuses the program: {refused.log.strip()[-500:]}") from refused
    syscall.attach_to_map(program, maps.sources, _VERDICT)
    return maps


def _offsets() -> Mapping[str, int]:
    """Where the running kernel keeps what the program reads."""
    from tpctl.bpf.btf import PLACE, Btf

    try:
        btf = Btf(PLACE.read_bytes())
    except (OSError, ValueError) as error:
        raise HostError(f"this kernel does not describe its structures in {PLACE} ({error})") from error
    found = {}
    for name, (structure, member) in _OFFSETS.items():
        offsets = btf.offsets(structure, (member,))
        if offsets is None:
            raise HostError(f"this kernel's struct {structure} has no {member}")
        found[name] = offsets[member]
    return found


def _compiled(text: str, flags: list[str]) -> tuple[Any, Any]:
    try:
        from bcc import BPF
        from bcc.libbcc import lib
    except (ImportError, OSError) as error:
        raise HostError(
            "it needs bcc's Python bindings (Debian, Ubuntu: apt install python3-bpfcc; Fedora, RHEL: dnf install "
            f"python3-bcc), and importing them failed: {error}"
        ) from error
    try:
        return BPF(text=text.encode(), cflags=flags), lib
    except Exception as error:  # bcc raises nothing narrower
        if os.geteuid() != 0:
            raise PermissionError(1, os.strerror(1)) from error
        raise HostError(f"bcc could not prepare the program: {error} (see the compiler's messages above)") from error

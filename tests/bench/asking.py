"""A client that asks a name server one thing after the other, for `make bench-dns`.

    python -m tests.bench.asking ADDRESS PORT FILE SECONDS   prints answers, seconds and lost queries

The file is one for dnsperf. dnsperf itself sleeps now and then when it may have only one query on its way, and takes
answers from anybody. A query is lost when there is no answer after five seconds, as for the C library. Ends with an
error when an answer is one.
"""

from __future__ import annotations

import itertools
import socket
import sys
import time
from pathlib import Path

import dns.message

_TIMEOUT = 5.0
_RCODE = 0x0F
"""The bits of the response code, of which none may be set."""


def main() -> None:
    """Ask."""
    host, port, names, seconds = sys.argv[1:]
    lines = (line.split() for line in Path(names).read_text().splitlines())
    queries = [dns.message.make_query(name, kind).to_wire() for name, kind in lines]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(_TIMEOUT)
        client.connect((host, int(port)))
        answered, lost = 0, 0
        began = time.monotonic()
        for query in itertools.cycle(queries):
            took = time.monotonic() - began
            if took > float(seconds):
                break
            client.send(query)
            try:
                answer = client.recv(4096)
            except TimeoutError:
                lost += 1
                continue
            answered += 1
            if answer[:2] != query[:2] or answer[3] & _RCODE or not answer[7]:
                raise SystemExit(f"{query!r} was answered by {answer!r}")
    print(answered, took, lost)


if __name__ == "__main__":
    main()

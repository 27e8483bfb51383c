"""Memory of idle TLS connections: `python -m tests.torture.idle` (root). The one relay encrypts, the other decrypts."""

from __future__ import annotations

import argparse
import contextlib
import socket
from collections.abc import Iterator

from tests.netns.relay import net as relay_net
from tests.netns.relay.certificates import Pki
from tests.netns.relay.net import HOST4, PEER4, Net, Relay
from tests.netns.relay.test_listeners import configured
from tests.torture.test_relay_torture import DECRYPTED, DECRYPTS, ENCRYPTED, ENCRYPTS, family, resident, rest

Pairs = list[tuple[socket.socket, socket.socket]]


def exchange(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    """Pass bytes through, a few at a time, so that they fit the buffers of sockets."""
    for start in range(0, size, 65536):
        piece = bytes(min(65536, size - start))
        sender.sendall(piece)
        left = len(piece)
        while left:
            left -= len(receiver.recv(left))


@contextlib.contextmanager
def connected(net: Net, count: int) -> Iterator[Pairs]:
    """So many connections through both relays, as clients and servers have them."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(net.listen(net.peer, (PEER4, DECRYPTED)))
        pairs: Pairs = []
        for _ in range(count):
            client = stack.enter_context(net.connect(net.host, (HOST4, ENCRYPTED)))
            client.sendall(b"?")
            server = stack.enter_context(listener.accept()[0])
            server.settimeout(relay_net.TIMEOUT)
            assert server.recv(1) == b"?"
            pairs.append((client, server))
        yield pairs


def measure(net: Net, relays: list[Relay], count: int) -> None:
    """Print what each connection takes."""
    pids = [family(running)[-1] for running in relays]
    with connected(net, 1):
        pass
    rest(pids)
    before = resident(pids)
    with connected(net, count) as pairs:
        for size in (1, 100, 16 * 1024, 256 * 1024):
            for client, server in pairs:
                exchange(client, server, size)
                exchange(server, client, size)
            rest(pids)
            each = [(now - old) / count / 1024 for now, old in zip(resident(pids), before, strict=True)]
            print(
                f"{count} connections, {size:6} bytes each way, KB each: {each[0]:5.1f}, {each[1]:5.1f} where decrypted"
            )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=1000)
    count = parser.parse_args().connections
    with relay_net.network(redirect=False) as net, relay_net.public_directory() as directory:
        pki = Pki(directory)
        certificate, key = pki.server
        first, second = directory / "first", directory / "second"
        first.mkdir()
        second.mkdir()
        decrypts = DECRYPTS.format(peer=PEER4, certificate=certificate, key=key, workers=1)
        encrypts = ENCRYPTS.format(ca=pki.root.path, workers=1)
        with configured(net, first, encrypts) as one, configured(net, second, decrypts) as other:
            measure(net, [one, other], count)


if __name__ == "__main__":
    main()

"""`--inbound-mode tproxy`: what refuses it, and which ports the relay looks for."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from tpctl.engines.ebpf.contents import contents_for
from tpctl.engines.nftables import drain
from tpctl.host import conntrack, proc
from tpctl.relay.loop import sock_diag
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.flags import Flags
from tpctl.relay.settings.model import Source
from tpctl.spec.document import from_document, to_document
from tpctl.spec.policy import Inbound, Policy, Redirection
from tpctl.system.errors import InputError

TRANSPARENT = Policy(proxy_uid=5678, inbound=Inbound(mode=Redirection.TPROXY))
CONNTRACK = (
    "ipv4     2 tcp      6 431999 {state} src=10.0.0.9 dst=10.0.0.5 sport=3495 dport=8080 "
    "src=10.0.0.5 dst=10.0.0.9 sport=8080 dport=3495 [ASSURED] mark={mark} zone=0 use=2"
)


def test_the_ebpf_engine_refuses_it() -> None:
    with pytest.raises(InputError, match="--inbound-mode tproxy"):
        contents_for(TRANSPARENT)


def test_a_record_without_a_mode_is_of_redirect() -> None:
    document = to_document(TRANSPARENT)
    assert from_document(document) == TRANSPARENT
    del document["inbound"]["mode"]
    assert from_document(document).inbound.mode is Redirection.REDIRECT


@pytest.mark.parametrize(
    ("state", "mark", "counts"),
    [("ESTABLISHED", 0x800, True), ("ESTABLISHED", 0x4801, True), ("ESTABLISHED", 0x1000, False),
     ("ESTABLISHED", 0, False), ("TIME_WAIT", 0x800, False), ("CLOSE", 0x800, False)],
)  # fmt: skip
def test_connections_in_a_clients_name_are_counted(
    state: str, mark: int, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / conntrack.LISTING).write_text(CONNTRACK.format(state=state, mark=mark))
    monkeypatch.setattr(proc, "NET", tmp_path)
    assert drain.dialled() == counts


def test_the_relays_flag_is_both_ends() -> None:
    inbound = Flags(transparent=True).settings().listeners[0]
    assert (inbound.listen.transparent, inbound.source) == (True, Source.CLIENT)
    assert Flags().settings().listeners[0].source is Source.PASSTHROUGH


def test_a_port_that_the_client_has_is_seen() -> None:
    """A connection of this very process stands for the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, name = listener.accept()
        with accepted:
            here = Destination(*listener.getsockname())
            assert sock_diag.is_connected(here, name)
            assert not sock_diag.is_connected(here, (name[0], name[1] ^ 1))
            # The side that ends it first keeps it for a while (TIME_WAIT): a new one may take its place.
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
            accepted.close()
            client.recv(1)
            client.close()
            assert not sock_diag.is_connected(here, name)

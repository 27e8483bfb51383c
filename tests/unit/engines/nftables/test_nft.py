"""libnftables may end the process it is called in: it does when it has no memory for what it reads."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tpctl.engines.nftables.nft import LibraryNft
from tpctl.system.errors import ApplyError


class Ending:
    """As libnftables is then (memory_allocation_error() in its src/utils.c)."""

    def set_stateless_output(self, _: bool) -> None: ...

    def cmd(self, _: bytes) -> tuple[int, bytes, bytes]:
        os.write(2, b"mnl.c:190: Memory allocation failure\n")
        os._exit(3)


def test_lists_that_end_the_library_are_told_in_our_words() -> None:
    with pytest.raises(ApplyError, match=r"could not be read: .*: Memory allocation failure"):
        LibraryNft(SimpleNamespace(Nftables=Ending)).listings(["list chains"])

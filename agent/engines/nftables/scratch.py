"""What this kernel and this nft would list for a table, found out in a network namespace that is gone afterwards.

nft rewrites what it is given (names of priorities, redundant matches, prefixes), each version in its own way. Comparing
two listings of the same nft avoids knowing any of that.
"""

from __future__ import annotations

import ctypes
import os
import threading

from agent.engines.nftables.nft import Nft
from agent.engines.nftables.table import TABLE
from agent.errors import HostError

CLONE_NEWNET = 0x40000000


def listing_of(nft: Nft, text: str) -> str:
    """How a table would be listed. This namespace is not touched.

    Raises HostError when the kernel refuses a namespace (CAP_SYS_ADMIN is needed), NftError when it refuses the table.
    """
    outcome: list[str | BaseException] = []

    def work() -> None:
        try:
            outcome.append(_listed_elsewhere(nft, text))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            outcome.append(error)

    # Namespaces belong to threads, and this one ends; so the caller never has to find its way back.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


def _listed_elsewhere(nft: Nft, text: str) -> str:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise HostError(f"no scratch network namespace to compare the rules in: {reason}")
    nft.execute(text)
    return nft.listing(f"list table {TABLE}")


def blocks(listing: str) -> dict[str, list[str]]:
    """A table's listing as its chains and sets: the first line of each, and the lines of it in order."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in listing.splitlines()[1:-1]:
        if not line.strip():
            continue
        if line.startswith("\t") and not line.startswith("\t\t"):
            if line.strip() == "}":
                continue
            current = found.setdefault(line.strip().removesuffix(" {"), [])
        else:
            current.append(line.strip())
    return found

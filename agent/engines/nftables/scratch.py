"""What this kernel and this nft would list for a table, found out where it acts on no traffic.

nft rewrites what it is given (names of priorities, redundant matches, prefixes), each version in its own way. Comparing
two listings of the same nft avoids knowing any of that.
"""

from __future__ import annotations

import ctypes
import os
import threading

from agent.engines.nftables.nft import Nft, held
from agent.engines.nftables.table import TABLE

CLONE_NEWNET = 0x40000000


_SCRATCH = f"{TABLE}_scratch"


def listing_of(nft: Nft, text: str, where: str = TABLE) -> str:
    """How a table (family and name) would be listed. Raises NftError when the kernel refuses it.

    A network namespace that is gone afterwards is the place; in a container that may not make one (CAP_SYS_ADMIN is
    needed), a dormant table, which the kernel attaches to no hook.
    """
    try:
        return _listed_in_thread(nft, text, where)
    except OSError:
        return _listed_dormant(nft, text, where)


def _listed_in_thread(nft: Nft, text: str, where: str) -> str:
    """Namespaces belong to threads; in one that ends, nobody has to find the way back."""
    outcome: list[str | BaseException] = []

    def work() -> None:
        try:
            outcome.append(_listed_elsewhere(nft, text, where))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result = outcome[0]
    if isinstance(result, BaseException):
        raise result
    return result


def _listed_elsewhere(nft: Nft, text: str, where: str) -> str:
    """Leaves the calling thread in a namespace of its own. Raises OSError when the kernel refuses one."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    nft.execute(text)
    return nft.listing(f"list table {where}")


def _listed_dormant(nft: Nft, text: str, where: str) -> str:
    body = text.removeprefix(f"table {where} {{")
    if held(nft, _SCRATCH) is not None:
        nft.execute(f"delete table {_SCRATCH}\n")  # of a run that was killed
    nft.execute(f"table {_SCRATCH} {{\n\tflags dormant;{body}")
    try:
        return nft.listing(f"list table {_SCRATCH}").replace("\tflags dormant\n", "", 1)
    finally:
        nft.execute(f"delete table {_SCRATCH}\n")


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

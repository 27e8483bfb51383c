"""What this kernel and this nft would list for a table, found out where it acts on no traffic.

nft rewrites what it is given (names of priorities, redundant matches, prefixes), each version in its own way. Comparing
two listings of the same nft avoids knowing any of that.
"""

from __future__ import annotations

from tpctl.engines.nftables.nft import Nft, held
from tpctl.engines.nftables.table import TABLE
from tpctl.system.networks import into_own_network
from tpctl.system.runner import TIMEOUT_SECONDS
from tpctl.system.text import lines
from tpctl.system.threads import in_thread

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
    return in_thread(lambda: _listed_elsewhere(nft, text, where), seconds=3 * TIMEOUT_SECONDS)


def _listed_elsewhere(nft: Nft, text: str, where: str) -> str:
    """Leaves the calling thread in a namespace of its own. Raises OSError when the kernel refuses one."""
    into_own_network()
    return nft.listing_of(text, f"list table {where}")


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
    for line in lines(listing)[1:-1]:
        if not line.strip():
            continue
        if line.startswith("\t") and not line.startswith("\t\t"):
            if line.strip() == "}":
                continue
            current = found.setdefault(line.strip().removesuffix(" {"), [])
        else:
            current.append(line.strip())
    return found

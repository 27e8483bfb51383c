"""What is installed, as a picture of who goes where: its parts, and how they look as text and in Mermaid. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpctl.cli.printing.output import NOBODY_KNOWN, UserNames
from tpctl.spec.policy import BoundSockets, DnsCapture, Policy, WhenProxyDown

if TYPE_CHECKING:
    from tpctl.change.listening import PortStatus

ARROW = " --> "
_CLASSES = {"end": "station", "hook": "hook", "plane": "plane", "down": "down"}
"""Of Mermaid, to which "end" is a word of its own."""
_MOST_ITEMS = 8
"""Of a list in a box; a policy may exclude thousands."""


@dataclass(frozen=True, slots=True)
class Box:
    """A station of a connection."""

    name: str
    detail: str = ""
    kind: str = "end"
    """"end", "hook", "plane" (the data plane) or "down" (it does not listen)."""


@dataclass(frozen=True, slots=True)
class Lane:
    """The way of one kind of connection."""

    title: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that is shown."""

    title: str
    lanes: tuple[Lane, ...]
    notes: tuple[tuple[str, str], ...]
    """What is left alone, refused or otherwise special: a word, and what about it."""


def picture(
    policy: Policy, engine: str, title: str, ports: tuple[PortStatus, ...] = (), names: UserNames = NOBODY_KNOWN
) -> Picture:
    """That of an installed policy."""
    listeners = {port.port: port for port in ports}
    return Picture(title, tuple(_lanes(policy, engine, listeners, names)), tuple(_notes(policy, names)))


def _lanes(policy: Policy, engine: str, listeners: Mapping[int, PortStatus], names: UserNames) -> Iterator[Lane]:
    inbound, outbound, dns = policy.inbound, policy.outbound, policy.dns
    arriving = "TPROXY" if inbound.is_transparent else "DNAT"
    into, out = _hook(engine, "PREROUTING", arriving), _hook(engine, "OUTPUT", "REDIRECT")
    if inbound.enabled:
        what = f"only ports {_list(inbound.include_ports)}" if inbound.include_ports else "TCP"
        dialled = "the client's own address" if inbound.is_transparent else "127.0.0.6, ::6"
        plane = _plane("inbound", inbound.port, listeners, names)
        yield Lane("inbound", (Box("client"), into, plane, Box("application", f"from {dialled}; {what}")))
    if outbound.enabled:
        what = f"only ports {_list(outbound.include_ports)}" if outbound.include_ports else "TCP"
        who = f"cgroup {policy.cgroup.path}" if policy.cgroup else "any user but the data plane's"
        plane = _plane("outbound", outbound.port, listeners, names)
        yield Lane("outbound", (Box("application", who), out, plane, Box("server", what)))
    if dns.capture is not DnsCapture.OFF:
        servers = "any server" if dns.capture is DnsCapture.ALL else _list(dns.servers)
        plane = _plane("DNS", dns.port, listeners, names)
        over = "UDP and TCP" if dns.tcp else "UDP"
        yield Lane("DNS", (Box("application", f"port 53, {over}"), out, plane, Box("name server", servers)))
    for vnet in policy.virtual_networks:
        plane = _plane("outbound", outbound.port, listeners, names)
        source = Box("container or VM", f"{vnet.network} behind {vnet.interface}")
        yield Lane("virtual network", (source, _hook(engine, "PREROUTING", "DNAT"), plane, Box("server", "TCP")))


def _hook(engine: str, chain: str, target: str) -> Box:
    if engine == "ebpf":
        return Box("eBPF", "sk_lookup" if chain == "PREROUTING" else "connect() and sendmsg()", "hook")
    return Box(chain, target, "hook")


def _plane(role: str, port: int, listeners: Mapping[int, PortStatus], names: UserNames) -> Box:
    found = listeners.get(port)
    if found is None:
        return Box(f"port {port}", f"{role} listener", "plane")
    if not found.uids:
        return Box(f"port {port}", f"{role}: nobody listens", "down")
    return Box(f"port {port}", f"{role}: {', '.join(map(names.of, found.uids))}", "plane")


def _notes(policy: Policy, names: UserNames) -> Iterator[tuple[str, str]]:
    inbound, outbound = policy.inbound, policy.outbound
    left_alone = (
        ("inbound to ports", inbound.exclude_ports if inbound.enabled and not inbound.include_ports else ()),
        ("inbound from", inbound.exclude_sources if inbound.enabled else ()),
        ("outbound to ports", outbound.exclude_ports if outbound.enabled and not outbound.include_ports else ()),
        ("anything to", outbound.exclude_destinations),
        ("connections of", outbound.exclude_uids),
        ("sockets with mark", outbound.exclude_marks),
        ("interfaces", policy.exclude_interfaces),
    )
    yield "excluded", f"the data plane's own connections: user {names.number(policy.proxy_uid)}"
    for what, items in left_alone:
        if items:
            yield "excluded", f"{what} {_list(items)}"
    for name, direction in (("inbound", inbound), ("outbound", outbound)):
        if not direction.enabled:
            yield "not redirected", f"{name} TCP"
    if policy.dns.capture is DnsCapture.OFF:
        yield "not redirected", "DNS"
    if len(policy.families) == 1:
        yield "not redirected", "IPv6" if 4 in policy.families else "IPv4"
    if policy.bound_sockets is BoundSockets.PASS:
        yield "excluded", "sockets bound to an interface (SO_BINDTODEVICE)"
    if policy.guard_ports:
        own = dict.fromkeys(str(port) for port in _own_ports(policy))
        yield "guarded", f"connections opened to {', '.join(own)} from elsewhere, or by applications, are reset"
    if policy.when_proxy_down is WhenProxyDown.BYPASS:
        yield "data plane down", "connections go straight on meanwhile"
    if policy.drop_invalid:
        yield "dropped", "packets that conntrack calls invalid"


def _own_ports(policy: Policy) -> Iterator[int]:
    if policy.inbound.enabled:
        yield policy.inbound.port
    if policy.outbound.enabled:
        yield policy.outbound.port
    if policy.dns.capture is not DnsCapture.OFF:
        yield policy.dns.port


def _list(items: object) -> str:
    assert isinstance(items, tuple | list)
    shown = [str(item) for item in items[:_MOST_ITEMS]]
    return ", ".join(shown) + (f" and {len(items) - _MOST_ITEMS} more" if len(items) > _MOST_ITEMS else "")


def as_text(shown: Picture) -> str:
    """Lines for a terminal, or for a ticket."""
    width = max(len(name) for name in (*(lane.title for lane in shown.lanes), *(word for word, _ in shown.notes)))
    lines = [shown.title, ""]
    for lane in shown.lanes:
        cells = [(f"[{box.name}]" if box.kind != "end" else box.name, box.detail) for box in lane.boxes]
        widths = [max(len(name), len(detail)) for name, detail in cells]
        names = ARROW.join(name.ljust(size) for (name, _), size in zip(cells, widths, strict=True))
        below = (" " * len(ARROW)).join(detail.ljust(size) for (_, detail), size in zip(cells, widths, strict=True))
        lines += [f"{lane.title:<{width}}  {names}".rstrip(), f"{'':<{width}}  {below}".rstrip(), ""]
    lines += [f"{word:<{width}}  {what}" for word, what in shown.notes]
    return "\n".join([*lines, ""])


def as_mermaid(shown: Picture) -> str:
    """A flowchart (mermaid.js.org), which GitHub, GitLab and many wikis draw."""
    lines = ["flowchart LR"]
    for number, lane in enumerate(shown.lanes):
        lines.append(f'  subgraph l{number} ["{_quoted(lane.title)}"]')
        lines.append("    direction LR")
        for place, box in enumerate(lane.boxes):
            text = _quoted(box.name) + (f"<br/><small>{_quoted(box.detail)}</small>" if box.detail else "")
            lines.append(f'    l{number}b{place}["{text}"]:::{_CLASSES[box.kind]}')
        lines.append("    " + " --> ".join(f"l{number}b{place}" for place in range(len(lane.boxes))))
        lines.append("  end")
    text = "<br/>".join(f"{_quoted(word)}: {_quoted(what)}" for word, what in shown.notes)
    lines.append(f'  notes["{text}"]:::note')
    lines += [
        "  classDef station fill:#fff,stroke:#555", "  classDef hook fill:#eef,stroke:#447",
        "  classDef plane fill:#dfd,stroke:#272", "  classDef down fill:#fdd,stroke:#a22",
        "  classDef note fill:#fff,stroke:#ccc,text-align:left",
    ]  # fmt: skip
    title = shown.title.replace("'", "''")  # a text of YAML
    return "\n".join([f"---\ntitle: '{title}'\n---", *lines, ""])


def _quoted(text: str) -> str:
    """A text between quotation marks: Mermaid reads entities (mermaid.js.org/syntax/flowchart.html)."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")

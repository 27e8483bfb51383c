"""A host with a data plane and a neighbour: what becomes of redirected connections, and what tpctl says of it."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from tests.neighbours.catalogue import PUBLISHED, SERVED, Neighbour
from tests.neighbours.room import Room
from tests.netns.lab import APP, PROXY, PROXY_USER, SAVES
from tpctl.arrival.owners import Owner
from tpctl.change import routing
from tpctl.rehearsal.lab import Lab
from tpctl.rehearsal.layout import HOST_ADDRESS, PEER_ADDRESS
from tpctl.spec.connection import Connection
from tpctl.spec.policy import Dns, DnsCapture, Family, Policy

LOST_SECONDS = 0.4
"""After that a connection is asked about, and after longer it is lost."""
REMOTE = {Family.IPV4: ip_address("203.0.113.7"), Family.IPV6: ip_address("2001:db8:71::7")}
POLICY = Policy(PROXY, dns=Dns(DnsCapture.ALL))
PORTS = {"inbound": POLICY.inbound.port, "outbound": POLICY.outbound.port}
_COUNTS = re.compile(r"\[\d+:\d+\]|packets \d+ bytes \d+| # handle \d+| expires \w+")
_TRANSLATED = re.compile(r"^table (ip|ip6) (filter|nat|mangle|raw|security) ")
_MOST_ROUNDS = 4


@dataclass(frozen=True)
class Lost:
    """A connection that does not get to the data plane."""

    connection: Connection
    ended: str

    @property
    def kind(self) -> str:
        """Such as "inbound IPv6"."""
        return f"{self.connection.direction} IPv{self.connection.family}"


class Scene:
    """The host. Every question is asked of the real command there."""

    def __init__(self, lab: Lab, room: Room, neighbour: Neighbour, flags: tuple[str, ...]) -> None:
        self.lab, self.room, self.neighbour, self.flags = lab, room, neighbour, flags
        self.seen: list[str] = []

    def install(self) -> None:
        """Everything is redirected from here on."""
        self.room.tpctl("install", "--kuma-dp-user", PROXY_USER, "--redirect-all-dns-traffic", *self.flags)

    def judge(self, moment: str) -> None:
        """Every connection arrives, or it is told whose rule takes it; and what is advised makes it arrive."""
        self._order(moment)
        lost, told = self._lost()
        if not lost:
            self.seen.append(f"{moment}: all arrive")
            return
        owners = ", ".join(sorted({one.kind for one in lost}))
        self.seen.append(f"{moment}: {owners} lost, and {self.neighbour.owner} named")
        for _ in range(_MOST_ROUNDS):
            advised = [command for one in told for command in [self._command(one)] if command]
            assert advised, told
            for command in dict.fromkeys(advised):
                self.room.script(command)
            self._order("after what was advised")
            lost, told = self._lost()
            if not lost:
                self.seen.append(f"{moment}, after what was advised: all arrive")
                return
        raise AssertionError(f"what is advised does not help: {lost} {told}")

    def _order(self, moment: str) -> None:
        """Where the neighbour has come before our rules, or taken them away, that is said, and `apply` repairs it."""
        found = self.status()
        gone = [line for line in found["problems"] if "holds none of its rules" in line]
        if found["drift"] or gone:
            self.seen.append(
                f"{moment}: {'the rules are gone' if gone else 'drift'}, which status tells, apply repairs"
            )
            self.room.tpctl("apply")
            found = self.status()
            assert (found["installed"], found["drift"]) == (True, [])

    def status(self) -> dict[str, Any]:
        """What status says."""
        shown: dict[str, Any] = json.loads(self.room.tpctl("status", "--json", check=False).stdout)
        return shown

    def _lost(self) -> tuple[list[Lost], list[str]]:
        """The connections that do not arrive, and what is told of those; fails when nothing is."""
        lost = [one for connection in self._connections() if (one := self._tried(connection, LOST_SECONDS))]
        probes = json.loads(self.room.tpctl("check", "--json", check=False).stdout)["probes"]
        problems = self.status()["problems"]
        told = [*(line for line in problems if "; to let them pass: " in line)]
        for probe in probes:
            if probe["fate"] in ("lost", "passed by"):
                assert probe["finding"], (probe, problems)
                told.append(f"{probe['finding']['where']} ({probe['finding']['whose']})"
                            f"; to let them pass: {probe['finding']['remedy']}")  # fmt: skip
        silent = [one for one in lost if not self._is_told(one, probes, problems)]
        slow = [one for one in silent if self._tried(one.connection, 20.0)]
        assert not slow, f"nothing names what takes them: {slow}\n{self.status()}\n{probes}"
        return [one for one in lost if one not in silent], told

    def _connections(self) -> list[Connection]:
        layout, near = self.lab.layout, self.neighbour.is_near
        found = [layout.outgoing("tcp", REMOTE[family], 443, APP) for family in Family]
        for family in Family:
            client = PEER_ADDRESS[family] if near else REMOTE[family]
            ports = (SERVED, PUBLISHED) if self.neighbour.published else (SERVED,)
            found += [layout.arriving(client, HOST_ADDRESS[family], "tcp", port) for port in ports]
        for wanted in self.neighbour.outgoing:
            made = layout.outgoing("tcp", ip_address(wanted.destination), wanted.port, APP)
            found.append(dataclasses.replace(made, source=ip_address(wanted.source)) if wanted.source else made)
        return found

    def _tried(self, connection: Connection, seconds: float) -> Lost | None:
        ended = str(self.lab.dial(connection, timeout=seconds))
        return None if ended == self._wanted(connection) else Lost(connection, ended)

    def _wanted(self, connection: Connection) -> str:
        """Where it ends; what is left to a container (docs/operations.md) has no listener there."""
        if connection.destination_port == PUBLISHED and connection.family in self.neighbour.published:
            return "refused"
        return f"host:{PORTS[connection.direction]}"

    def _is_told(self, lost: Lost, probes: list[dict[str, Any]], problems: list[str]) -> bool:
        owner, connection = self.neighbour.owner, lost.connection
        named = any(
            probe["direction"] == connection.direction
            and probe["family"] == connection.family
            and (probe["finding"] or {}).get("whose") == owner
            for probe in probes
        )
        about = ("answers of ", f" at port {PORTS[connection.direction]}:")
        return named or any(f"a rule of {owner} " in line and any(word in line for word in about) for line in problems)

    def _command(self, told: str) -> str:
        """What is advised, without how it is kept."""
        command = told.partition("; to let them pass: ")[2].split(" (", 1)[0]
        for words, meant in self.neighbour.meant.items():
            command = command.replace(words, meant)
        return command

    def foreign(self) -> dict[str, list[str]]:
        """Every rule and chain that is not ours, in order, and policies other than to accept."""
        found: dict[str, list[str]] = {}
        for tool in SAVES:
            lines = _COUNTS.sub("", self.room.run(tool).stdout).splitlines()
            found[tool] = [line for line in lines if _is_foreign(line)]
        ruleset = _COUNTS.sub("", self.room.run("nft", "list", "ruleset").stdout)
        blocks = re.split(r"^(?=table )", re.sub(r"^#.*\n", "", ruleset, flags=re.M), flags=re.M)
        found["nft"] = [one for one in blocks if not _TRANSLATED.match(one) and not one.startswith("table inet tpctl")]
        for what in ("rule", "-6 rule"):
            shown = self.room.run("ip", *what.split()).stdout.splitlines()
            found[what] = [line for line in shown if f"lookup {routing.TABLE}" not in line]
        return found


def _whose(owner: str) -> str:
    """How a problem of status begins."""
    return "a rule " if owner == str(Owner.ADMINISTRATOR) else f"a rule of {owner} "


def _is_foreign(line: str) -> bool:
    """Whether a line of a save means something that is not ours; a built-in chain that accepts means nothing."""
    if "TPCTL_" in line or line[:1] not in ("-", ":"):
        return False
    return line.startswith("-A") or " - " in line or " DROP" in line

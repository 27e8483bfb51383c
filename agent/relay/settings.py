"""What the relay is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from agent.errors import InputError
from agent.policy import DEFAULT_DNS_PORT, DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT, MAX_PORT

MAX_WORKERS = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """The relay's options. Raises InputError, naming every problem, when they make no sense together."""

    inbound_port: int = DEFAULT_INBOUND_PORT
    outbound_port: int = DEFAULT_OUTBOUND_PORT
    dns_port: int = DEFAULT_DNS_PORT
    bind_address: str = "::"
    resolv_conf: Path = Path("/etc/resolv.conf")
    workers: int = 1
    drain_seconds: float = 30.0
    access_log: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"--{name}-port: {port} is not within 1-{MAX_PORT}"
            for name, port in self.named_ports.items()
            if not 1 <= port <= MAX_PORT
        ]
        names: dict[int, list[str]] = {}
        for name, port in self.named_ports.items():
            names.setdefault(port, []).append(f"--{name}-port")
        problems += [
            f"{' and '.join(same)} are both {port}; each listener needs a port of its own"
            for port, same in names.items()
            if len(same) > 1
        ]
        try:
            ip_address(self.bind_address)
        except ValueError:
            problems.append(f"--bind-address: {self.bind_address!r} is not an IP address")
        if not 1 <= self.workers <= MAX_WORKERS:
            problems.append(f"--workers: {self.workers} is not within 1-{MAX_WORKERS}")
        if not 0 <= self.drain_seconds < float("inf"):
            problems.append(f"--drain-timeout: {self.drain_seconds:g} is not a number of seconds")
        if problems:
            raise InputError(problems)

    @property
    def named_ports(self) -> dict[str, int]:
        """The ports by the name of their listener."""
        return {"inbound": self.inbound_port, "outbound": self.outbound_port, "dns": self.dns_port}

    @property
    def ports(self) -> frozenset[int]:
        """The ports of all listeners."""
        return frozenset(self.named_ports.values())

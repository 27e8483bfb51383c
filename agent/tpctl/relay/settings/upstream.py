"""A listener's `upstream`: where the client wanted to go, one address, or the services of a Kuma Dataplane."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from tpctl.config.dataplane import read_networking
from tpctl.config.values import BadValueError, quoted, read_port
from tpctl.relay.loop.original_destination import Destination
from tpctl.relay.settings.listen import read_address
from tpctl.relay.settings.model import FixedAddress, OriginalDestination, ServicePorts, Upstream
from tpctl.relay.settings.section import ConfigSection, text
from tpctl.system.input_files import UnusableFileError

_SHAPE = "write original_destination, dataplane, or ADDRESS:PORT"


def read_upstream(section: ConfigSection) -> Upstream:
    """The upstream rule of a listener's section; problems are noted there."""
    upstream = section.take("upstream", _word_or_address, OriginalDestination())
    path = section.take("dataplane_file", text, None)
    variables: Mapping[str, str] = section.take("dataplane_variables", _variables, {})
    if upstream is not None:
        if path is not None:
            section.complain("dataplane_file", "has no effect unless upstream is dataplane")
        return upstream
    if path is None:
        section.complain("upstream", "dataplane needs dataplane_file, the path of a Dataplane resource")
        return OriginalDestination()
    try:
        return ServicePorts(service_ports(read_networking(path, variables)), Path(path))
    except UnusableFileError as error:
        section.complain("dataplane_file", f"{path} {error}")
    except BadValueError as bad:
        for problem in bad.problems:
            section.complain("dataplane_file", f"{path}: {problem}")
    return OriginalDestination()


def service_ports(networking: Mapping[str, Any]) -> dict[int, tuple[str | None, int]]:
    """The services of a Dataplane's networking section, by the inbound port. Raises BadValueError.

    The fields are those of api/mesh/v1alpha1/dataplane.proto in kumahq/kuma: servicePort defaults to port, and
    serviceAddress to the inbound's own address.
    """
    inbounds, found, problems = networking.get("inbound"), {}, []
    for index, inbound in enumerate(inbounds if isinstance(inbounds, list) else []):
        place = f"networking.inbound[{index}]"
        if not isinstance(inbound, Mapping):
            problems.append(f"{place}: {quoted(inbound)} is a value where keys are expected")
            continue
        try:
            port = read_port(inbound.get("port"), _ignore)
            service = read_port(inbound.get("servicePort") or port, _ignore)
            address = inbound.get("serviceAddress")
            found[port] = (address and str(_address(address, service).host), service)
        except BadValueError as bad:
            problems += [f"{place}: {problem}" for problem in bad.problems]
    if problems:
        raise BadValueError(problems)
    return found


def named_upstreams(upstream: Upstream) -> list[Destination]:
    """The addresses that stand in the configuration."""
    if isinstance(upstream, FixedAddress):
        return [upstream.destination]
    services = upstream.services.values() if isinstance(upstream, ServicePorts) else ()
    return [at(host, port) for host, port in services if host is not None]


def at(host: str, port: int) -> Destination:
    """An address and port as a destination."""
    return Destination(host, port, socket.AF_INET6 if ":" in host else socket.AF_INET)


def _address(value: object, port: int) -> Destination:
    host = f"[{value}]" if isinstance(value, str) and ":" in value else value
    read = read_address(f"{host}:{port}")
    assert isinstance(read, Destination)
    return read


def read_address_or_original(value: object) -> Upstream:
    """`original_destination` or an address and port. Raises BadValueError."""
    found = _word_or_address(value)
    if found is None:
        raise BadValueError("dataplane is for listeners; write original_destination or ADDRESS:PORT")
    return found


def _word_or_address(value: object) -> Upstream | None:
    """None stands for the services of a Dataplane."""
    if value == "original_destination":
        return OriginalDestination()
    if value == "dataplane":
        return None
    try:
        address = read_address(value)
    except BadValueError:
        raise BadValueError(f"{quoted(value)} is not an upstream; {_SHAPE}") from None
    if not isinstance(address, Destination):
        raise BadValueError(f"{quoted(value)}: a unix socket is not an upstream; {_SHAPE}")
    if ip_address(address.host).is_unspecified:
        raise BadValueError(
            f"{quoted(value)}: that is every address of the host; name one, as in 127.0.0.1:{address.port}"
        )
    return FixedAddress(address)


def _variables(value: object) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise BadValueError(f"{quoted(value)} is not a mapping of names to values")
    return {str(name): str(one) for name, one in value.items()}


def _ignore(_note: str) -> None:
    """Notes that are of no use here."""

"""Kuma's Dataplane resource as a source of configuration: what the data plane will listen on is what is redirected to.

The fields are those of api/mesh/v1alpha1/dataplane.proto in kumahq/kuma; both forms of the resource are read, that of
Universal (`type: Dataplane`) and that of Kubernetes (`kind: Dataplane`, with a `spec`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tpctl.config.options import BY_NAME
from tpctl.config.sources import Findings, Given
from tpctl.config.values import BadValueError, quoted, read_port, shown
from tpctl.config.yaml_text import parse_yaml
from tpctl.spec.policy import Ports, includes
from tpctl.system.input_files import UnusableFileError, read_configuration

if TYPE_CHECKING:
    from tpctl.config.effective import Config

_PROXYING = "networking.transparentProxying"
_INBOUND = "networking.inbound"
_VARIABLE = re.compile(r"\{\{\{?\s*&?\s*([^{}]*?)\s*\}?\}\}")
_FAMILY_MODES = {"DualStack": "dualstack", "IPv4": "ipv4"}
_PORTS = {"redirectPortInbound": "inbound_port", "redirectPortOutbound": "outbound_port"}


def read(path: str, variables: Mapping[str, str]) -> Findings:
    """What the file says, as values of options; problems when it cannot be used."""
    found = Findings()
    try:
        networking = read_networking(path, variables)
    except UnusableFileError as error:
        found.problems.append(f"dataplane {path}: {error}")
        return found
    try:
        for name, raw, where in _values(networking):
            found.given.append(Given(BY_NAME[name], raw, f"dataplane {path}: {where}"))
    except BadValueError as bad:
        found.problems += [f"dataplane {path}: {problem}" for problem in bad.problems]
    return found


def read_networking(path: str, variables: Mapping[str, str]) -> Mapping[str, Any]:
    """The networking section of the resource. Raises UnusableFileError."""
    networking = _networking(parse_yaml(_filled(read_configuration(path), variables)))
    if networking is None:
        raise UnusableFileError("is not a Dataplane resource with a networking section")
    return networking


def contradictions(config: Config, dataplane: Findings) -> Iterator[str]:
    """Values that were given elsewhere and are not those of the Dataplane: one of the two must be wrong."""
    for given in dataplane.given:
        name = given.option.name
        try:
            theirs: Any = given.option.read(given.raw, lambda note: None)
        except BadValueError:
            continue  # reported when it is read
        if name == "inbound_include_ports":
            yield from _inbound_contradictions(config, theirs, given.origin)
        elif config.is_given(name) and getattr(config, name) != theirs:
            yield f"{config.origin(name)}: {_text(getattr(config, name))} contradicts {given.origin}: {_text(theirs)}"


def _inbound_contradictions(config: Config, theirs: Ports, origin: str) -> Iterator[str]:
    """Ports the data plane serves, and the redirection would leave alone."""
    if not config.inbound_enabled:
        yield f"{config.origin('inbound_enabled')}: false contradicts {origin}, which has ports to redirect"
    for port in theirs:
        if config.inbound_include_ports:
            if not includes(config.inbound_include_ports, port.first):
                yield f"{config.origin('inbound_include_ports')} leaves out port {port}, which is in {origin}"
        elif includes(config.inbound_exclude_ports, port.first):
            yield f"{config.origin('inbound_exclude_ports')} has port {port}, which is in {origin}"


def _values(networking: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """Option, value and where it stands. Raises BadValueError."""
    proxying = _mapping(networking.get("transparentProxying"), _PROXYING)
    for key, name in _PORTS.items():
        if proxying.get(key):  # 0 stands for "not set" in protobuf
            yield name, proxying[key], f"{_PROXYING}.{key}"
    inbound6 = proxying.get("redirectPortInboundV6")
    if inbound6 and inbound6 != proxying.get("redirectPortInbound"):
        raise BadValueError(
            f"{_PROXYING}.redirectPortInboundV6 is {inbound6}: IPv6 goes to the same port as IPv4; leave it out"
        )
    mode = proxying.get("ipFamilyMode")
    if mode in _FAMILY_MODES:
        yield "ip_family_mode", _FAMILY_MODES[mode], f"{_PROXYING}.ipFamilyMode"
    elif mode not in (None, "UnSpecified"):
        raise BadValueError(f"{_PROXYING}.ipFamilyMode: {quoted(mode)} is not one of {', '.join(_FAMILY_MODES)}")
    if networking.get("gateway"):
        yield "inbound_enabled", False, "networking.gateway"
        return
    ports = [_port(one, index) for index, one in enumerate(_list(networking.get("inbound")))]
    if ports:
        yield "inbound_include_ports", ports, _INBOUND


def _port(inbound: object, index: int) -> int:
    where = f"{_INBOUND}[{index}]"
    try:
        return read_port(_mapping(inbound, where).get("port"), lambda note: None)
    except BadValueError as bad:
        raise BadValueError(f"{where}.port: {bad}") from None


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadValueError(f"{where}: {quoted(value)} is a value where keys are expected")
    return value


def _list(value: object) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadValueError(f"{_INBOUND}: {quoted(value)} is not a list")
    return value


def _networking(tree: object) -> Mapping[str, Any] | None:
    if not isinstance(tree, Mapping) or "Dataplane" not in (tree.get("type"), tree.get("kind")):
        return None
    body = tree.get("spec") if tree.get("kind") == "Dataplane" else tree
    networking = body.get("networking") if isinstance(body, Mapping) else None
    return networking if isinstance(networking, Mapping) else None


def _filled(text: str, variables: Mapping[str, str]) -> str:
    """The template with its variables, as kuma-dp fills it; plain variables only, as in all of its documentation."""
    missing = sorted({shown(name) for name in _VARIABLE.findall(text) if name not in variables})
    if missing:
        first = missing[0]
        raise UnusableFileError(f"has variables without a value: {', '.join(missing)}; add --dataplane-var {first}=...")
    return _VARIABLE.sub(lambda found: variables[found[1]], text)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

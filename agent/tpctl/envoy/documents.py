"""The documents of which Envoy is configured, as plain data, and as the files in which it looks for them. Pure.

Envoy reads `bootstrap.json` when it starts, and nothing else by itself. The bootstrap tells it to watch the files of
listeners (LDS) and clusters (CDS), and these name the files of secrets (SDS). It takes a watched file anew when one is
*renamed* onto it; a file that is written in place may be read half-written, or not at all. It watches directories and
looks at every file of a watched one, so each file has a directory of its own. (envoyproxy.io, "xDS configuration API
overview", and `core.v3.PathConfigSource`.)

The resources are what Envoy's JSON is: there is no library of its messages, and the binary is the schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

Resource = dict[str, Any]
"""A message of Envoy's as JSON has it. Resources of the lists below begin with "@type"."""

BOOTSTRAP = "bootstrap.json"
CLUSTERS = "cds/cds.json"
LISTENERS = "lds/lds.json"
TYPE = "type.googleapis.com/envoy."
"""How every type's name begins."""


def secret_file(name: str) -> str:
    """The file of a secret, below `Places.folder`."""
    return f"sds/{name}/sds.json"


class Places(NamedTuple):
    """Where things are on the host on which Envoy runs; the documents name these paths."""

    folder: Path = Path("/run/tpctl-envoy")
    """Absolute: under it lie the files of `Documents.files`."""
    admin: Path = Path("/run/tpctl-envoy/admin.sock")
    """Envoy's admin interface, a unix socket with mode 0600. Envoy makes it; the directory has to exist."""
    credentials: Path | None = None
    """Where the secrets of `{credential: NAME}` are: systemd's $CREDENTIALS_DIRECTORY. None: there are none."""
    authorities: Path = Path("/etc/ssl/certs/ca-certificates.crt")
    """The host's own, for upstream_tls without a ca_file; `tpctl.envoy.referenced.host_authorities` finds them."""
    here: frozenset[str] = frozenset()
    """Upstreams that are addresses of this host; `tpctl.envoy.referenced.here` finds them."""
    connections: int = 50_000
    """Connections of clients at the same time, beyond which Envoy closes new ones; each may need two descriptors."""

    def watched(self, name: str) -> Resource:
        """A ConfigSource of a file below the folder, which Envoy reads again when another is renamed onto it."""
        path = self.folder / name
        source = {"path": str(path), "watched_directory": {"path": str(path.parent)}}
        return {"path_config_source": source, "resource_api_version": "V3"}


class Documents(NamedTuple):
    """A whole configuration. `tpctl.envoy.render` makes it; the same settings and places give the same bytes."""

    bootstrap: Resource
    """What needs a restart when it changes."""
    listeners: list[Resource]
    """LDS."""
    clusters: list[Resource]
    """CDS. Envoy must have them before the listeners that name them."""
    secrets: list[Resource]
    """SDS: each has a name. They name files, and hold no secret themselves."""

    def files(self) -> dict[str, bytes]:
        """The files by their names below `Places.folder`, in the order in which they have to be put there.

        Secrets come before clusters, clusters before listeners, and the bootstrap last. When a configuration is
        replaced, a cluster or secret that is no longer named may only go after Envoy has the new listeners.
        """
        found = {secret_file(one["name"]): _discovery([one]) for one in self.secrets}
        found[CLUSTERS] = _discovery(self.clusters)
        found[LISTENERS] = _discovery(self.listeners)
        found[BOOTSTRAP] = _readable(self.bootstrap)
        return found

    def versions(self) -> dict[str, str]:
        """The version of each file of resources: /config_dump shows it once Envoy has taken the file."""
        found = {secret_file(one["name"]): version([one]) for one in self.secrets}
        return {**found, CLUSTERS: version(self.clusters), LISTENERS: version(self.listeners)}

    def ports(self) -> frozenset[int]:
        """The ports of TCP on which Envoy listens. It lets every thread have a socket of its own (SO_REUSEPORT)."""
        bound = (one["address"] for one in self.listeners if one.get("bind_to_port", True))
        return frozenset(one["socket_address"]["port_value"] for one in bound if "socket_address" in one)


def version(resources: list[Resource]) -> str:
    """The version_info of resources: the beginning of a hash of them."""
    text = json.dumps(resources, sort_keys=True, separators=(",", ":"))
    import hashlib  # here: it loads OpenSSL, and `tpctl status` asks this module only where things are

    return hashlib.sha256(text.encode()).hexdigest()[:16]


def static(documents: Documents) -> bytes:
    """The same as one bootstrap without any dynamic part, for `envoy --mode validate --config-path`.

    That mode does not look at watched files at all: nonsense in them passes. In a static document it looks at
    everything, and reads the certificates, keys and secrets, so it needs the rights to.
    """
    rest = {key: value for key, value in documents.bootstrap.items() if key != "dynamic_resources"}
    resources = {
        "listeners": [_static(one) for one in documents.listeners],
        "clusters": [_static(one) for one in documents.clusters],
        "secrets": [_static(one) for one in documents.secrets],
    }
    return _readable({**rest, "static_resources": resources})


def _static(resource: Resource) -> Any:
    return _without_sds({key: value for key, value in resource.items() if key != "@type"})


def _without_sds(value: Any) -> Any:
    """A reference to a secret without where it is looked up names a static one."""
    if isinstance(value, dict):
        return {key: _without_sds(one) for key, one in value.items() if key != "sds_config"}
    return [_without_sds(one) for one in value] if isinstance(value, list) else value


def _discovery(resources: list[Resource]) -> bytes:
    return _readable({"version_info": version(resources), "resources": resources})


def _readable(document: Resource) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

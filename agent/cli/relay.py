"""`tpctl relay`: run the small data plane."""

from __future__ import annotations

from pathlib import Path

import click

from agent.policy import DEFAULT_DNS_PORT, DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT, MAX_PORT

PORT = click.IntRange(1, MAX_PORT)


@click.command("relay")
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
    "--resolv-conf",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/resolv.conf"),
    show_default=True,
    help="The name servers that DNS queries are forwarded to; changes of the file are followed.",
)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that share the work.")
@click.option(
    "--drain-timeout",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long connections may take to end after SIGTERM or SIGINT. A second signal ends them at once.",
)
@click.option(
    "--user",
    metavar="NAME",
    help="Started as root, become this user (or uid) before opening a socket. It must be the policy's data plane user.",
)
@click.option("--access-log", is_flag=True, help="Log a line for every connection when it ends.")
@click.option(
    "--log-format",
    type=click.Choice(["auto", "text", "json"]),
    default="auto",
    show_default=True,
    help="auto: text on a terminal, JSON otherwise.",
)
def command(user: str | None, log_format: str, drain_timeout: float, **options: object) -> int:
    """Run the small data plane that comes with tpctl, in the foreground.

    It passes redirected connections on to where they were going, and DNS queries to the host's name servers. Inbound
    connections reach the application from 127.0.0.6 or ::6. Run it as the data plane user of the installed policy.

    \b
    Example:
      tpctl relay --user kuma-dp
      tpctl relay --user kuma-dp --workers 2 --drain-timeout 10 --access-log
    """
    from agent.log import configure, get_logger
    from agent.relay.settings import Settings
    from agent.relay.supervisor import become, serve

    settings = Settings(drain_seconds=drain_timeout, **options)  # type: ignore[arg-type]  # click has checked the types
    configure(log_format)
    if user is not None:
        become(user)
    return serve(settings, get_logger())

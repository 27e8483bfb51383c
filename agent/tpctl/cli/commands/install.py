"""`tpctl install`: redirect this host's traffic to the data plane."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Unpack

import click

from tpctl.cli.options.confirming import confirm_option
from tpctl.cli.options.conventions import without_former
from tpctl.cli.options.policy_options import PolicyCommand, PolicyInput, install_options
from tpctl.cli.options.probing import After, probe_options
from tpctl.system.errors import InputError

if TYPE_CHECKING:
    from tpctl.change.lifecycle import InstallReport
    from tpctl.config.effective import Config
    from tpctl.config.options import Option
    from tpctl.config.resolve import Resolved

VALIDATOR = "transparent-proxy-validator"
KUMACTL_WORD = "transparent-proxy"
"""`kumactl install transparent-proxy`: the word is accepted so that existing scripts only change the command."""

EPILOG = """\b
Boolean flags may stand alone or take a value: --redirect-dns, --redirect-inbound=false.
Every flag has a YAML key (--print-config shows it) and a variable, TPCTL_... or
KUMA_TRANSPARENT_PROXY_...; flags override variables, variables override files.

\b
Examples:
  tpctl install --kuma-dp-user kuma-dp --exclude-inbound-ports 22 --redirect-dns
  tpctl install --config /etc/tpctl/config.yaml --dry-run
  tpctl install --config /etc/tpctl/config.yaml --confirm-within 60s
"""


class InstallCommand(PolicyCommand):
    """Takes flags of older kumactl, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put in their place what they mean now."""
        from tpctl.cli.options import former_flags

        if VALIDATOR in args:  # before its own flags are found to be none of ours
            _check_word(VALIDATOR)
        return super().parse_args(ctx, without_former(args, former_flags.INSTALL))


@click.command(cls=InstallCommand, epilog=EPILOG, context_settings={"max_content_width": 110})
@install_options
@click.option("--print-config", is_flag=True, help="Print the effective configuration with its origins, and stop.")
@confirm_option
@probe_options
@click.option("--yes", is_flag=True, help="On a terminal, do not ask whether to go on when nothing listens there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("what", required=False, metavar=f"[{KUMACTL_WORD}]")
def command(
    policy_input: PolicyInput, what: str | None, print_config: bool, yes: bool, as_json: bool, **after: Unpack[After]
) -> None:
    """Redirect this host's traffic to the data plane.

    Inbound connections go to port 15006, outbound ones to port 15001 and, with --redirect-dns, DNS queries to port
    15053. An earlier installation of tpctl or kumactl is replaced without a gap. Needs root, except for --dry-run.
    """
    from tpctl.config.resolve import resolve
    from tpctl.host.facts import LiveHost
    from tpctl.host.privilege import require_root

    _check_word(what)
    config = policy_input.load_config()
    if print_config:
        _print_config(config, as_json=as_json)
        return
    resolved = resolve(config, LiveHost())
    if config.dry_run:
        _dry_run(resolved, as_json=as_json)
        return
    require_root("tpctl install")
    if not (yes or as_json) and _is_interactive():
        _ask_without_listener(resolved)
    _install(config, resolved, after, as_json=as_json)


def _is_interactive() -> bool:
    """Whether somebody sits there who can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _ask_without_listener(resolved: Resolved) -> None:
    """Ask whether to go on, if nothing listens on the data plane's ports, and nothing is redirected there already."""
    from tpctl.change import health
    from tpctl.record import state
    from tpctl.spec.policy import WhenProxyDown

    policy = resolved.policy
    if policy.when_proxy_down is WhenProxyDown.BYPASS or state.load() is not None:
        return
    silent = [port for port in health.port_statuses(policy, resolved.options.engine) if not port.uids]
    if not silent:
        return
    ports = ", ".join(f"{port.protocol} {port.port} ({port.role})" for port in silent)
    click.echo(f"nothing listens on {ports}: connections that are redirected there are refused until it does", err=True)
    click.confirm("Install all the same?", abort=True, err=True)


def _check_word(what: str | None) -> None:
    if what == VALIDATOR:
        raise InputError(
            f"{VALIDATOR} has become a command of its own: `tpctl verify` rehearses a policy, and `tpctl check` tries "
            "what is installed"
        )
    if what not in (None, KUMACTL_WORD):
        from tpctl.config.values import quoted

        hint = (
            "; give a boolean value with an equals sign, as in --redirect-dns=false"
            if what in ("true", "false")
            else ""
        )
        raise InputError(f"{quoted(what)} is not expected here; the only argument is {KUMACTL_WORD}{hint}")


def _print_config(config: Config, *, as_json: bool) -> None:
    from tpctl.cli.printing import output
    from tpctl.cli.printing.print_config import as_data, as_yaml

    if as_json:
        output.as_json("Configuration", {"config": as_data(config), "notices": config.notices})
    else:
        output.notices(config.notices)
        click.echo(as_yaml(config))


def _dry_run(resolved: Resolved, *, as_json: bool) -> None:
    from tpctl.cli.printing import output
    from tpctl.engines import preview

    text = preview.ruleset(resolved.policy, resolved.options)
    if as_json:
        output.as_json("DryRun", {"dryRun": True, "text": text, "notices": resolved.notices})
    else:
        output.notices(resolved.notices)
        click.echo(text, nl=not text.endswith("\n"))


def _install(config: Config, resolved: Resolved, after: After, *, as_json: bool) -> None:
    from tpctl.change import health, lifecycle
    from tpctl.cli.options import confirming, probing
    from tpctl.cli.printing import output, streams
    from tpctl.config import inputs
    from tpctl.system.errors import TpctlError, described

    if not as_json:  # before the kernel is touched, so that they are seen when it refuses
        output.notices(resolved.notices)
    if config.verbose and not as_json:
        output.notices(
            f"{option.key} is {getattr(config, option.name)!s}, by {config.origins[option.name]}"
            for option in _given(config)
        )
    confirming.end_overdue(after["confirm_within"])
    given = inputs.to_document(config)
    report = lifecycle.install(resolved.policy, resolved.options, inputs=given, confirm_within=probing.hold(after))
    streams.done()
    report, arrival = probing.settle(report, after)
    listening: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    try:
        problems = listening = health.arrival_problems(report.policy, report.engine)
        problems += _by_others(report)
    except (TpctlError, OSError, MemoryError) as error:  # it is installed: exit code 1 would say that it is not
        problems += (f"not everything that may keep connections away could be looked for: {described(error)}",)
    warnings = [f"warning: {problem}" for problem in problems]
    warnings += probing.warnings(arrival, report.pending, told=bool(listening))
    if as_json:
        output.as_json("Install", {**_report_data(resolved, report, warnings), "arrival": probing.data(arrival)})
    else:
        _print_report(report)
        output.notices(warnings)


def _by_others(report: InstallReport) -> tuple[str, ...]:
    """What rules of others do to redirected connections; where there are none, nothing is loaded to read them."""
    from tpctl.engines import presence

    if not presence.others():
        return ()
    from tpctl.engines.listings import Listings

    listings = Listings()
    if listings.are_ours(report.variant):
        return ()
    from tpctl.arrival import notices
    from tpctl.engines import forwarded, precedence
    from tpctl.engines.foreign_tables import foreign_tables

    found = forwarded.warnings(report.policy)
    found += precedence.problems(report.policy, report.engine, report.variant, listings)
    beside = foreign_tables(listings)
    found += notices.problems(report.policy, report.engine, beside)
    return found + notices.bypasses(report.policy, report.engine, beside)


def _given(config: Config) -> list[Option]:
    from tpctl.config.options import OPTIONS

    return [option for option in OPTIONS if config.is_given(option.name)]


def _report_data(resolved: Resolved, report: InstallReport, warnings: list[str]) -> dict[str, object]:
    from tpctl.cli.options import confirming
    from tpctl.spec.document import to_document

    return {
        "installed": True,
        "changed": report.changed,
        "engine": report.engine,
        "variant": report.variant,
        "reason": report.reason,
        "families": list(report.families),
        "replaced": list(report.replaced),
        "policy": to_document(report.policy),
        "pending": confirming.data(report.pending),
        "notices": [*resolved.notices, *report.notices, *warnings],
    }


def _print_report(report: InstallReport) -> None:
    from tpctl.cli.options import confirming
    from tpctl.cli.printing import output

    output.notices(report.notices)
    by = f"{report.engine} ({report.variant})" if report.variant else report.engine
    what = "installed" if report.changed else "unchanged, exactly this is installed already"
    click.echo(f"{what}: {output.family_names(report.families)} by {by}")
    output.pairs(
        [
            *output.describe(report.policy),
            ("because", report.reason),
            *(("replaced", one) for one in report.replaced),
            *confirming.request(report.pending),
            ("look at it", "tpctl status"),
            ("remove it", "tpctl uninstall"),
        ]
    )

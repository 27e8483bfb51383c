"""`tpctl install`: redirect this host's traffic to the data plane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.cli.confirming import confirm_option
from agent.cli.policy_options import PolicyCommand, PolicyInput, install_options
from agent.errors import InputError

if TYPE_CHECKING:
    from agent.config import Config
    from agent.lifecycle import InstallReport
    from agent.options import Option
    from agent.resolve import Resolved

KUMACTL_WORD = "transparent-proxy"
"""`kumactl install transparent-proxy`: the word is accepted so that existing scripts only change the command."""

EPILOG = """\b
Truth values may stand alone or with a value: --redirect-dns, --redirect-inbound=false.
Every flag has a YAML key (--print-config shows it) and a variable, TPCTL_... or
KUMA_TRANSPARENT_PROXY_...; flags override variables, variables override files.

\b
Examples:
  tpctl install --kuma-dp-user kuma-dp --exclude-inbound-ports 22 --redirect-dns
  tpctl install --config /etc/tpctl/config.yaml --dry-run
  tpctl install --config /etc/tpctl/config.yaml --confirm-within 60s
"""


@click.command(cls=PolicyCommand, epilog=EPILOG, context_settings={"max_content_width": 110})
@install_options
@click.option("--print-config", is_flag=True, help="Print the effective configuration with its origins, and stop.")
@confirm_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("what", required=False, metavar=f"[{KUMACTL_WORD}]")
def command(
    policy_input: PolicyInput, what: str | None, print_config: bool, as_json: bool, confirm_within: float | None
) -> None:
    """Redirect this host's traffic to the data plane.

    Connections that arrive go to port 15006, those the host opens to port 15001 and, if asked for, DNS queries to port
    15053. An earlier installation of tpctl or kumactl is replaced without a gap. Needs root, except for --dry-run.
    """
    from agent.host.facts import LiveHost
    from agent.resolve import resolve

    _check_word(what)
    config = policy_input.load_config()
    if print_config:
        _print_config(config, as_json=as_json)
        return
    resolved = resolve(config, LiveHost())
    if config.dry_run:
        _dry_run(resolved, as_json=as_json)
    else:
        _install(config, resolved, confirm_within, as_json=as_json)


def _check_word(what: str | None) -> None:
    if what not in (None, KUMACTL_WORD):
        from agent.config_values import quoted

        hint = (
            "; give a truth value with an equals sign, as in --redirect-dns=false" if what in ("true", "false") else ""
        )
        raise InputError(f"{quoted(what)} is not expected here; only {KUMACTL_WORD} may stand without a flag{hint}")


def _print_config(config: Config, *, as_json: bool) -> None:
    from agent.cli import output
    from agent.cli.print_config import as_data, as_yaml

    if as_json:
        output.as_json({"config": as_data(config), "notices": config.notices})
    else:
        output.notices(config.notices)
        click.echo(as_yaml(config))


def _dry_run(resolved: Resolved, *, as_json: bool) -> None:
    from agent import dry_run
    from agent.cli import output

    text = dry_run.ruleset(resolved.policy, resolved.options)
    if as_json:
        output.as_json({"dry_run": True, "text": text, "notices": resolved.notices})
    else:
        output.notices(resolved.notices)
        click.echo(text, nl=not text.endswith("\n"))


def _install(config: Config, resolved: Resolved, confirm_within: float | None, *, as_json: bool) -> None:
    from agent import lifecycle
    from agent.cli import confirming, output, streams
    from agent.host.privilege import require_root
    from agent.status import firewall_problems, port_problems

    require_root("tpctl install")
    if not as_json:  # before the kernel is touched, so that they are seen when it refuses
        output.notices(resolved.notices)
    if config.verbose and not as_json:
        output.notices(
            f"{option.key} is {getattr(config, option.name)!s}, by {config.origins[option.name]}"
            for option in _given(config)
        )
    confirming.end_overdue(confirm_within)
    report = lifecycle.install(resolved.policy, resolved.options, confirm_within=confirm_within)
    streams.done()
    problems = (*port_problems(report.policy), *firewall_problems(report.policy, report.engine))
    warnings = [f"warning: {problem}" for problem in problems]
    if as_json:
        output.as_json(_report_data(resolved, report, warnings))
    else:
        _print_report(report)
        output.notices(warnings)


def _given(config: Config) -> list[Option]:
    from agent.options import OPTIONS

    return [option for option in OPTIONS if config.is_given(option.name)]


def _report_data(resolved: Resolved, report: InstallReport, warnings: list[str]) -> dict[str, object]:
    from agent.cli import confirming
    from agent.policy_document import to_document

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
    from agent.cli import confirming, output

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
            ("take it away", "tpctl uninstall"),
        ]
    )

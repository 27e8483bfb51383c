"""`tpctl persist`: what brings the redirection back after a reboot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = """\b
Examples:
  tpctl persist                show what the next boot will do
  tpctl persist --systemd      install from /etc/tpctl/config.yaml at every boot
  tpctl persist --firewalld    let firewalld keep the rules that are installed now
  tpctl persist --remove       the next boot will do nothing
"""


@click.command("persist", epilog=EXAMPLE)
@click.option("--systemd", "units", is_flag=True, help="Write and enable tpctl.service, and a drop-in for kuma-dp.")
@click.option("--firewalld", is_flag=True, help="Store the rules that are installed now in firewalld's direct.xml.")
@click.option("--remove", is_flag=True, help="Take both away again. The redirection itself stays until the reboot.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path("/"),
    metavar="DIRECTORY",
    help="With --systemd or --remove: work on the file system of an image that is mounted there.",
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(units: bool, firewalld: bool, remove: bool, root: Path, as_json: bool) -> None:
    """Make the redirection come back after a reboot, or see whether it will.

    The unit installs what /etc/tpctl/config.yaml says. firewalld brings back the rules themselves, and needs the
    iptables engine.
    """
    from agent.cli import output, streams
    from agent.host.privilege import require_root
    from agent.persist import outlook

    if remove and (units or firewalld):
        raise InputError("--remove takes everything away; give it alone")
    if firewalld and root != Path("/"):
        raise InputError("--firewalld stores what is installed on this host; it does not go with --root")
    require_root("tpctl persist")
    done: list[str] = []
    notices: list[str] = []
    if remove:
        done += _remove(root)
    if units:
        done += _systemd(root, notices)
    if firewalld:
        done += _firewalld()
    if done:
        streams.done()
    boot = outlook.next_boot(root)
    if as_json:
        output.as_json({"done": done, "notices": notices, "nextBoot": boot})
        return
    output.notices(notices)
    for line in done:
        click.echo(line)
    for line in boot or ("nothing of tpctl's",):
        click.echo(f"next boot: {line}")


def _systemd(root: Path, notices: list[str]) -> list[str]:
    from agent.persist import systemd

    if root == systemd.ROOT:
        notices.extend(differences())
    return list(systemd.install(root))


def _firewalld() -> list[str]:
    import dataclasses

    from agent import lifecycle, state

    record = state.load()
    if record is None:
        raise InputError("nothing is on record in this network namespace; use tpctl install --store-firewalld")
    if record.options.engine != "iptables":
        raise InputError(
            f"the {record.options.engine} engine is installed: firewalld's reloads leave its rules alone, and cannot "
            "store them; `tpctl persist --systemd` brings them back after a reboot"
        )
    report = lifecycle.install(record.policy, dataclasses.replace(record.options, store_firewalld=True))
    return ["stored the rules in firewalld's direct.xml"] if report.changed else []


def _remove(root: Path) -> list[str]:
    import dataclasses

    from agent import lifecycle, state
    from agent.persist import firewalld, systemd

    done = [f"removed {path}" for path in systemd.remove(root)]
    record = state.load()
    if record and record.options.store_firewalld:
        lifecycle.install(record.policy, dataclasses.replace(record.options, store_firewalld=False))
        done.append("took the rules out of firewalld's direct.xml")
    elif root == systemd.ROOT:
        with state.locked():
            change = firewalld.removing()
            if change:
                change.carry_out()
                done.append("took the rules out of firewalld's direct.xml")
    return done


def differences() -> Iterator[str]:
    """What the unit will do otherwise than what is installed now. Raises InputError when it can do nothing at all."""
    import dataclasses

    from agent import config, state
    from agent.host.facts import LiveHost
    from agent.persist import systemd
    from agent.policy_document import to_document
    from agent.resolve import resolve

    path = systemd.ROOT / systemd.CONFIG
    record = state.load()
    if not path.is_file():
        return  # said when the unit is written
    # At boot nobody comes in by ssh, so the guard that may have been at work now does nothing then.
    stored = dataclasses.replace(config.load(files=[str(path)]), ssh_guard=False)
    wanted = resolve(stored, LiveHost()).policy
    if record is None or record.policy == wanted:
        return
    ours, theirs = to_document(record.policy), to_document(wanted)
    names = sorted(name for name in ours if ours[name] != theirs[name])
    yield (
        f"warning: {path} describes another policy than the one installed now ({', '.join(names)} differ), and it is "
        "what the next boot installs"
    )
    if wanted.inbound != record.policy.inbound:
        now, then = (sorted(map(str, policy.inbound.exclude_ports)) for policy in (record.policy, wanted))
        lost = ", ".join(port for port in now if port not in then)
        if lost:
            yield f"warning: inbound ports {lost} are not redirected now, but will be after the next boot"

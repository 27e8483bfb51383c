"""`tpctl persist`: what brings the redirection back after a reboot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpctl.cli.complete import candidates
from tpctl.system.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tpctl.spec.policy import Policy

EXAMPLE = """\b
Examples:
  tpctl persist                show what the next boot will do
  tpctl persist --systemd      install from /etc/tpctl/config.yaml at every boot
  tpctl persist --systemd --envoy
                               have Envoy serve /etc/tpctl/envoy.yaml at every boot, too
  tpctl persist --firewalld    let firewalld keep the rules that are installed now
  tpctl persist --reserve-ports
                               no outgoing connection gets one of the data plane's ports
  tpctl persist --remove       the next boot will do nothing
"""


@click.command("persist", epilog=EXAMPLE)
@click.option("--systemd", "units", is_flag=True, help="Write and enable tpctl.service, and a drop-in for kuma-dp.")
@click.option("--envoy", is_flag=True, help="With --systemd: write and enable tpctl-envoy.service, too.")
@click.option("--firewalld", is_flag=True, help="Store the rules that are installed now in firewalld's direct.xml.")
@click.option(
    "--reserve-ports",
    "reserve",
    is_flag=True,
    help="Add the data plane's ports to net.ipv4.ip_local_reserved_ports, now and at every boot.",
)
@click.option("--remove", is_flag=True, help="Remove all of it again. The redirection itself stays until the reboot.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path("/"),
    metavar="DIRECTORY",
    help="Except with --firewalld: work on the file system of an image mounted there.",
)
@click.option(
    "--command",
    "called",
    metavar="PATH",
    shell_complete=candidates.files,
    help="With --systemd: the tpctl that the units call, by its path in the image. Searched for by default.",
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    *,
    units: bool,
    envoy: bool,
    firewalld: bool,
    reserve: bool,
    remove: bool,
    root: Path,
    called: str | None,
    as_json: bool,
) -> None:
    """Make the redirection come back after a reboot, or show whether it will.

    The unit installs what /etc/tpctl/config.yaml says. firewalld brings back the rules themselves, and needs the
    iptables engine.
    """
    from tpctl.cli.printing import output, streams
    from tpctl.host.privilege import require_root
    from tpctl.persist import outlook

    if remove and (units or firewalld or reserve):
        raise InputError("--remove removes everything; use it alone")
    root = root.resolve()
    if called is not None and not units:
        raise InputError("--command names what the systemd units call; use it with --systemd")
    if envoy and not units:
        raise InputError("--envoy adds to the systemd units; use it with --systemd")
    if firewalld and root != Path("/"):
        raise InputError("--firewalld stores what is installed on this host; it cannot be combined with --root")
    require_root("tpctl persist")
    done: list[str] = []
    notices: list[str] = []
    if remove:
        done += _remove(root)
    if units:
        done += _systemd(root, called, notices, envoy=envoy)
    if firewalld:
        done += _firewalld()
    if reserve:
        done += _reserve(root)
    if done:
        streams.done()
    boot = outlook.next_boot(root)
    if as_json:
        output.as_json("Persist", {"done": done, "notices": notices, "nextBoot": boot})
        return
    output.notices(notices)
    for line in done:
        click.echo(line)
    for line in boot or ("nothing from tpctl",):
        click.echo(f"next boot: {line}")


def _systemd(root: Path, called: str | None, notices: list[str], *, envoy: bool) -> list[str]:
    from tpctl.persist import systemd

    if root == systemd.ROOT:
        notices.extend(differences())
        path = systemd.ROOT / systemd.ENVOY_CONFIG
        if envoy and path.is_file():
            from tpctl.envoy.settings import load

            load(str(path))  # what is wrong with it is said now, not at boot
    return list(systemd.install(root, command=called, resolv_conf=_resolv_conf(root), envoy=envoy))


def _resolv_conf(root: Path) -> str:
    """The list of name servers that the configuration names."""
    from tpctl.config import load
    from tpctl.persist import systemd, watch
    from tpctl.persist.image import within

    try:
        return load.load(files=[str(within(root, systemd.CONFIG))]).resolv_conf
    except InputError:
        return watch.RESOLV_CONF  # what is wrong with the file was said, or will be at boot


def _reserve(root: Path) -> list[str]:
    from tpctl.engines.landings import ports
    from tpctl.host.proc import in_first_namespace
    from tpctl.persist import reserved_ports, systemd

    if root == systemd.ROOT and not in_first_namespace():
        raise InputError(
            "--reserve-ports: a boot sets this for the host's first network namespace, and this is another one; "
            "`tpctl status` shows the command for it, if it is needed"
        )
    return list(reserved_ports.reserve(root, {port.number for port in ports(_policy(root))}))


def _policy(root: Path) -> Policy:
    """What is installed here, else what the configuration says of ports. Raises InputError when there is neither."""
    from tpctl.config import load
    from tpctl.persist import systemd
    from tpctl.persist.image import shown, within
    from tpctl.record import state
    from tpctl.spec.policy import Dns, DnsCapture, Inbound, Outbound, Policy

    record = state.load() if root == systemd.ROOT else None
    if record:
        return record.policy
    path = within(root, systemd.CONFIG)
    if not path.is_file():
        raise InputError(
            f"--reserve-ports: nothing is installed here, and {shown(root, systemd.CONFIG)} does not exist, so "
            "the data plane's ports are not known; install first, or write that file"
        )
    config = load.load(files=[str(path)])
    capture = DnsCapture.ALL if config.dns_enabled or config.dns_capture_all else DnsCapture.OFF
    return Policy(
        proxy_uid=0,
        inbound=Inbound(config.inbound_enabled, config.inbound_port),
        outbound=Outbound(config.outbound_enabled, config.outbound_port),
        dns=Dns(capture, config.dns_port, tcp=config.dns_tcp),
        virtual_networks=config.virtual_networks,
    )


def _firewalld() -> list[str]:
    import dataclasses

    from tpctl.change import lifecycle
    from tpctl.record import state

    record = state.load()
    if record is None:
        raise InputError("nothing is on record in this network namespace; use tpctl install --store-firewalld")
    if record.options.engine != "iptables":
        raise InputError(
            f"the {record.options.engine} engine is installed: firewalld's reloads leave its rules alone, and cannot "
            "store them; `tpctl persist --systemd` brings them back after a reboot"
        )
    options = dataclasses.replace(record.options, store_firewalld=True)
    report = lifecycle.install(record.policy, options, inputs=record.inputs)
    return ["stored the rules in firewalld's direct.xml"] if report.changed else []


def _remove(root: Path) -> list[str]:
    import dataclasses

    from tpctl.change import lifecycle
    from tpctl.persist import firewalld, reserved_ports, systemd
    from tpctl.record import state

    done = [f"removed {path}" for path in (*systemd.remove(root), *reserved_ports.release(root))]
    if root != systemd.ROOT:
        return done
    record = state.load()
    if record and record.options.store_firewalld:
        options = dataclasses.replace(record.options, store_firewalld=False)
        lifecycle.install(record.policy, options, inputs=record.inputs)
        done.append("removed the rules from firewalld's direct.xml")
    else:
        with state.locked():
            change = firewalld.removing()
            if change:
                change.carry_out()
                done.append("removed the rules from firewalld's direct.xml")
    return done


def differences() -> Iterator[str]:
    """What the unit will do differently from what is installed now. Raises InputError when it can do nothing at all."""

    from tpctl.config import load as config
    from tpctl.config.resolve import resolve
    from tpctl.host.facts import LiveHost
    from tpctl.persist import systemd
    from tpctl.record import state
    from tpctl.spec.document import to_document

    path = systemd.ROOT / systemd.CONFIG
    record = state.load()
    if not path.is_file():
        return  # said when the unit is written
    # At boot nobody comes in by ssh, so the guard that may have been at work now does nothing then.
    stored = config.load(files=[str(path)])._replace(ssh_guard=False)
    wanted = resolve(stored, LiveHost()).policy
    if record is None or record.policy == wanted:
        return
    ours, theirs = to_document(record.policy), to_document(wanted)
    names = sorted(name for name in ours if ours[name] != theirs[name])
    yield (
        f"warning: {path} describes a different policy from the one installed now ({', '.join(names)} differ), and it "
        "is what the next boot installs"
    )
    if wanted.inbound != record.policy.inbound:
        now, then = (sorted(map(str, policy.inbound.exclude_ports)) for policy in (record.policy, wanted))
        lost = ", ".join(port for port in now if port not in then)
        if lost:
            yield f"warning: inbound ports {lost} are not redirected now, but will be after the next boot"

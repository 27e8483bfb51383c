"""systemd's units in a root directory of the test's own, judged by systemd's own tools."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.persist.test_direct_xml import PLANS
from tpctl.engines import direct
from tpctl.persist import direct_xml, neighbours, outlook, systemd, watch
from tpctl.system.errors import HostError, InputError

MAX_EXPOSURE = 1.5
SYSTEM = Path("/usr/lib/systemd/system")
analyzed = pytest.mark.skipif(
    not shutil.which("systemd-analyze") or not SYSTEM.is_dir(), reason="no systemd-analyze here"
)


def program(root: Path, name: str, text: str = "") -> None:
    """A file that can be executed."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    (root / name).chmod(0o755)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with systemd and a configuration."""
    units = tmp_path / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    (units / "multi-user.target").write_text("[Unit]\n")
    for name in ("usr/bin/tpctl", "opt/tpctl/bin/tpctl"):
        program(tmp_path, name)
    (tmp_path / "etc/tpctl").mkdir(parents=True)
    (tmp_path / "etc/tpctl/config.yaml").write_text("kumaDPUser: kuma-dp\n")
    return tmp_path


def tree(root: Path) -> dict[str, str]:
    """Every file and link below a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else "/"
    return found


def test_nothing_is_written_through_a_link(root: Path, tmp_path: Path) -> None:
    units = root / "etc/systemd/system"
    units.mkdir(parents=True)
    other = tmp_path / "of-the-administrator"
    other.write_text("his\n")
    (units / systemd.SERVICE).symlink_to(other)
    (units / systemd.RELAY).symlink_to("/dev/null")
    before = tree(root)
    with pytest.raises(HostError) as refused:
        systemd.install(root, command="/usr/bin/tpctl")
    assert "tpctl.service is a symbolic link, not a unit file of tpctl's: remove it first" in str(refused.value)
    assert f"run `systemctl --root={root} unmask tpctl-relay.service` first" in str(refused.value)
    assert tree(root) == before


def test_a_mask_is_the_administrators_and_is_believed(root: Path) -> None:
    systemd.install(root, command="/usr/bin/tpctl")
    unit = root / "etc/systemd/system" / systemd.SERVICE
    unit.unlink()
    unit.symlink_to("/dev/null")
    assert not systemd.is_enabled(root)
    assert systemd.remove(root)
    assert [name for name in tree(root) if "tpctl" in name and name.startswith("etc/systemd")] == [
        f"etc/systemd/system/{systemd.SERVICE}"
    ]


@pytest.mark.parametrize("kuma", [True, False])
def test_installed_enabled_and_taken_away_again(root: Path, kuma: bool) -> None:
    (root / "etc/systemd/system" / systemd.WANTED).mkdir(parents=True)
    if kuma:
        (root / "etc/systemd/system/kuma-dp.service").write_text("[Service]\nExecStart=/bin/true\n")
    before = tree(root)
    done = systemd.install(root, command="/opt/tpctl/bin/tpctl")
    assert systemd.is_enabled(root)
    assert systemd.has_drop_in(root) is kuma
    assert len(done) == 9 + kuma
    units = "".join(text for name, text in tree(root).items() if name not in before)
    assert "ExecStart=/opt/tpctl/bin/tpctl install --config /etc/tpctl/config.yaml" in units
    assert ("ExecStartPre=+/opt/tpctl/bin/tpctl install" in units) is kuma
    assert "/usr/bin/tpctl" not in units
    assert systemd.install(root, command="/opt/tpctl/bin/tpctl") == ()
    assert systemd.install(root, command="/usr/bin/tpctl")
    there = 8 + kuma + len(neighbours.links())
    assert len(systemd.remove(root, dry_run=True)) == there
    assert systemd.is_enabled(root)
    assert len(systemd.remove(root)) == there
    assert tree(root) == before
    assert systemd.remove(root) == ()


def watched(root: Path) -> list[str]:
    text = (root / systemd.UNITS / watch.PATH).read_text()
    return [line.removeprefix("PathChanged=") for line in text.splitlines() if line.startswith("PathChanged=")]


def test_the_list_of_name_servers_is_watched_and_what_it_leads_to(root: Path) -> None:
    systemd.install(root, command="/usr/bin/tpctl")
    assert watched(root) == ["/etc/resolv.conf"]
    assert (root / systemd.UNITS / watch.LINK).is_symlink()
    (root / "etc/resolv.conf").symlink_to("../run/resolve/stub.conf")
    (root / "run/resolve").mkdir(parents=True)
    (root / "run/resolve/stub.conf").symlink_to("/run/resolve/own.conf")
    systemd.install(root, command="/usr/bin/tpctl")
    files = ["/etc/resolv.conf", "/run/resolve/stub.conf", "/run/resolve/own.conf"]
    assert watched(root) == [*files, "/etc", "/run/resolve"], "links may be replaced"
    (root / "run/resolve/own.conf").symlink_to("/etc/resolv.conf")  # in a circle
    systemd.install(root, command="/usr/bin/tpctl")
    assert watched(root) == [*files, "/etc", "/run/resolve"]
    systemd.install(root, command="/usr/bin/tpctl", resolv_conf="/srv/a b/100%.conf")
    assert watched(root) == ["/srv/a b/100%%.conf"]


def test_what_a_killed_one_was_writing_goes(root: Path) -> None:
    leftover = root / systemd.UNITS / f".tpctl-{systemd.SERVICE}-abc"
    other = root / systemd.UNITS / ".tpctl-other.service-abc"
    for path in (leftover, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[Unit]")
    systemd.remove(root, dry_run=True)
    assert leftover.exists()
    assert systemd.remove(root) == ()
    assert not leftover.exists()
    assert other.exists()


def test_drop_ins_of_others_stay(root: Path) -> None:
    (root / "etc/systemd/system/kuma-dp.service.d").mkdir(parents=True)
    (root / "etc/systemd/system/kuma-dp.service.d/site.conf").write_text("[Unit]\n")
    (root / "usr/lib/systemd/system/kuma-dp.service").write_text("[Service]\n")
    before = tree(root)
    systemd.install(root, command="/usr/bin/tpctl")
    systemd.remove(root)
    assert {name: text for name, text in tree(root).items() if not name.endswith("wants")} == before


def test_without_a_configuration_nothing_is_written(root: Path) -> None:
    (root / systemd.CONFIG).unlink()
    before = tree(root)
    with pytest.raises(InputError, match="print-config"):
        systemd.install(root, command="/usr/bin/tpctl")
    assert tree(root) == before


def test_without_systemd_nothing_is_written(root: Path) -> None:
    (root / "usr/lib/systemd/system/multi-user.target").unlink()
    before = tree(root)
    with pytest.raises(HostError, match="no systemd"):
        systemd.install(root, command="/usr/bin/tpctl")
    assert tree(root) == before


def test_a_command_in_a_home_is_within_reach_of_the_relay(root: Path) -> None:
    assert "ProtectHome=read-only" in systemd.unit_text(systemd.RELAY, "/home/me/.venv/bin/tpctl")
    assert "ProtectHome=yes" in systemd.unit_text(systemd.RELAY, "/opt/bin/tpctl")


ODD_NAMES = ["a b", "50%t", "a;b", "ünï", "$HOME", "a=b", "~"]


@analyzed
@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_command_may_lie_anywhere(tmp_path: Path, name: str) -> None:
    """systemd itself reads the path out of the unit."""
    command = tmp_path / name / "tpctl"
    command.parent.mkdir()
    for unit in (systemd.SERVICE, watch.SERVICE, systemd.RELAY, systemd.DROP_IN):
        file = tmp_path / "tried.service"
        text = systemd.unit_text(unit, str(command))
        file.write_text(text if "ExecStart=" in text else f"{text}\nExecStart=/bin/true\n")
        command.unlink(missing_ok=True)
        assert f"{command} is not executable" in verify(file)
        command.write_text("#!/bin/sh\n")
        command.chmod(0o755)
        assert "not executable" not in verify(file)


def verify(unit: Path) -> str:
    """What systemd-analyze says of a unit file."""
    argv = ["systemd-analyze", "verify", "--man=no", str(unit)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120).stderr


@pytest.mark.parametrize("command", ["/tmp/venv/bin/tpctl", "/var/tmp/tpctl", "/run/user/0/venv/bin/tpctl"])
def test_a_command_that_units_do_not_see_is_refused(command: str) -> None:
    with pytest.raises(HostError, match="install tpctl elsewhere"):
        systemd.install(command=command)


def test_a_path_that_no_unit_file_can_hold_is_refused(root: Path) -> None:
    before = tree(root)
    for name in ("a\nExecStart=x", "\udcff", "it's", 'a"b', "back\\slash"):
        with pytest.raises(HostError, match="cannot name"):
            systemd.install(root, command=f"/opt/{name}/tpctl")
    assert tree(root) == before


def test_the_path_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = tmp_path / "tpctl"
    command.touch()
    monkeypatch.setattr(sys, "argv", [str(command)])
    assert systemd.own_path() == str(command)
    monkeypatch.setattr(sys, "argv", ["/somewhere/main.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    assert systemd.own_path() == str(command)


def test_what_the_next_boot_does(root: Path) -> None:
    assert outlook.next_boot(root) == ()
    (root / "usr/lib/systemd/system/kuma-dp.service").write_text("[Service]\n")
    systemd.install(root, command="/usr/bin/tpctl")
    service, kuma = outlook.next_boot(root)
    assert service == f"tpctl.service installs what {root}/etc/tpctl/config.yaml says"
    assert kuma.startswith("kuma-dp.service installs")
    (root / systemd.CONFIG).unlink()
    assert "but that file is missing" in outlook.next_boot(root)[0]
    systemd.remove(root)
    (root / "etc/firewalld").mkdir()
    (root / "etc/firewalld/direct.xml").write_bytes(direct_xml.with_rules(direct_xml.EMPTY, direct.of_plan(PLANS[0])))
    assert "is not enabled" in outlook.next_boot(root)[0]
    wants = root / "etc/systemd/system/multi-user.target.wants"
    (wants / "firewalld.service").symlink_to("/usr/lib/systemd/system/firewalld.service")
    assert outlook.next_boot(root) == ("firewalld installs the rules in its direct.xml",)
    (root / "etc/firewalld/direct.xml").write_text("<direct><rule")
    assert outlook.next_boot(root) == ()


@pytest.fixture
def machine(root: Path) -> Path:
    """The same with the machine's own units and a user for the relay, as far as systemd-analyze looks."""
    shutil.copytree(SYSTEM, root / "usr/lib/systemd/system", symlinks=True, dirs_exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nkuma-dp:x:5678:5678::/:/bin/false\n")
    for name in ("usr/bin/tpctl", "usr/bin/kuma-dp", "bin/kill"):
        program(root, name, "")
    (root / "etc/systemd/system").mkdir(parents=True)
    text = "[Service]\nUser=kuma-dp\nExecStart=/usr/bin/kuma-dp run\n"
    (root / "etc/systemd/system/kuma-dp.service").write_text(text)
    (root / systemd.ENVOY_CONFIG).write_text("listeners: []\n")
    systemd.install(root, command="/usr/bin/tpctl", envoy=True)
    return root


@analyzed
@pytest.mark.parametrize(
    "unit",
    [
        systemd.SERVICE,
        *watch.UNITS,
        neighbours.SERVICE,
        systemd.RELAY,
        systemd.RELAY_SOCKET,
        systemd.ENVOY,
        "kuma-dp.service",
    ],
)
def test_systemd_finds_nothing_wrong(machine: Path, unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={machine}", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "tpctl" in line or "kuma-dp" in line]
    assert (done.returncode, ours) == (0, [])


@analyzed
def test_systemd_finds_nothing_wrong_with_the_drop_in_for_sockmap(machine: Path) -> None:
    relay = (Path(__file__).parents[3] / "docs/relay.md").read_text()
    text = relay.partition("tpctl-relay.service.d/sockmap.conf\n")[2].partition("```")[0]
    assert "CapabilityBoundingSet=CAP_BPF" in text
    folder = machine / "etc/systemd/system/tpctl-relay.service.d"
    folder.mkdir()
    (folder / "sockmap.conf").write_text(text)
    test_systemd_finds_nothing_wrong(machine, systemd.RELAY)
    (folder / "sockmap.conf").write_text(text.replace("PrivateUsers=", "PrivateUserz="))
    with pytest.raises(AssertionError, match="PrivateUserz"):
        test_systemd_finds_nothing_wrong(machine, systemd.RELAY)


@analyzed
def test_systemd_finds_what_is_wrong(machine: Path) -> None:
    """So that the silence above means something."""
    path = machine / "etc/systemd/system" / systemd.SERVICE
    path.write_text(path.read_text().replace("/usr/bin/tpctl install", "/usr/bin/missing install"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={machine}", systemd.SERVICE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "/usr/bin/missing" in done.stderr


@analyzed
@pytest.mark.parametrize("unit", [systemd.RELAY, systemd.ENVOY])
def test_a_data_plane_is_hardly_exposed(machine: Path, unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--root={machine}", unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= MAX_EXPOSURE


def test_envoy_is_started_at_boot_only_if_that_was_asked_for(root: Path) -> None:
    systemd.install(root, command="/usr/bin/tpctl")
    assert not systemd.is_enabled(root, systemd.ENVOY)
    with pytest.raises(InputError, match=r"envoy\.yaml does not exist"):
        systemd.install(root, command="/usr/bin/tpctl", envoy=True)
    (root / systemd.ENVOY_CONFIG).write_text("listeners: []\n")
    socket = root / "etc/systemd/system/sockets.target.wants" / systemd.RELAY_SOCKET
    socket.parent.mkdir()
    socket.symlink_to(f"/etc/systemd/system/{systemd.RELAY_SOCKET}")
    before = tree(root)
    with pytest.raises(InputError, match=rf"systemctl --root={root} disable tpctl-relay\.socket` first"):
        systemd.install(root, command="/usr/bin/tpctl", envoy=True)
    assert tree(root) == before
    socket.unlink()
    done = systemd.install(root, command="/usr/bin/tpctl", envoy=True)
    assert f"enabled {systemd.ENVOY} in {root}" in done
    assert systemd.is_enabled(root, systemd.ENVOY)
    assert f"{systemd.ENVOY} has Envoy serve what {root}/etc/tpctl/envoy.yaml says" in outlook.next_boot(root)
    assert systemd.install(root, command="/usr/bin/tpctl", envoy=True) == ()
    # The command moves: the unit is renewed without being asked for again.
    systemd.install(root, command="/opt/tpctl/bin/tpctl")
    unit = (root / "etc/systemd/system" / systemd.ENVOY).read_text()
    assert "ExecStart=/opt/tpctl/bin/tpctl envoy run ${TPCTL_ENVOY_FILE}" in unit
    systemd.remove(root)
    assert not [name for name in tree(root) if "envoy" in name and name.startswith("etc/systemd")]


def test_the_units_are_at_the_top_of_the_repository_too() -> None:
    top = Path(__file__).resolve().parents[3] / "systemd"
    for name in (
        systemd.SERVICE,
        neighbours.SERVICE,
        systemd.RELAY,
        systemd.RELAY_SOCKET,
        systemd.ENVOY,
        systemd.DROP_IN,
    ):
        assert (top / name).read_text() == systemd.unit_text(name, systemd.SHIPPED_COMMAND)

"""An image that is being built: its links are its own, and its units call its own tpctl."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.persist.test_systemd import analyzed, program, root, tree
from tpctl.cli.commands import persist
from tpctl.persist import image, outlook, systemd
from tpctl.system.errors import HostError, InputError

__all__ = ["root"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the command is root's")


@pytest.fixture
def picture(root: Path) -> Path:
    """An image without any tpctl."""
    (root / "usr/bin/tpctl").unlink()
    (root / "opt/tpctl/bin/tpctl").unlink()
    return root


def test_links_lead_where_they_will_lead(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "etc").symlink_to("/usr/./lib/../lib")
    (tmp_path / "usr/lib/out").symlink_to("../../../../../../../etc/x")
    (tmp_path / "circle").symlink_to("/circle")
    assert image.within(tmp_path, "/lib/systemd") == tmp_path / "usr/lib/systemd"
    assert image.within(tmp_path, "etc/a/b") == tmp_path / "usr/lib/a/b"
    assert image.within(tmp_path, "lib/out") == tmp_path / "usr/lib/x"
    assert image.within(tmp_path, "lib/out", follow=False) == tmp_path / "usr/lib/out"
    assert image.within(tmp_path, "../../lib/./new") == tmp_path / "usr/lib/new"
    with pytest.raises(HostError, match="too many symbolic links"):
        image.within(tmp_path, "circle/x")


@pytest.mark.parametrize("where", ["usr/bin/tpctl", "usr/local/bin/tpctl", "usr/local/sbin/tpctl"])
def test_units_call_the_tpctl_of_the_image(picture: Path, where: str) -> None:
    program(picture, where)
    systemd.install(picture)
    text = (picture / systemd.UNITS / systemd.SERVICE).read_text()
    assert f"ExecStart=/{where} install" in text


def test_a_tpctl_elsewhere_has_to_be_named(picture: Path) -> None:
    program(picture, "opt/venv/bin/tpctl", "#!/opt/venv/bin/python3 -I\n")
    before = tree(picture)
    with pytest.raises(InputError, match=r"there is no tpctl in .* --command"):
        systemd.install(picture)
    named = "/opt/venv/bin/tpctl"
    with pytest.raises(InputError, match=f"{picture}/opt/venv/bin/python3 does not exist"):
        systemd.install(picture, command=named)
    assert tree(picture) == before
    (picture / "opt/venv/bin/python3").symlink_to("/usr/bin/python3.11")
    program(picture, "usr/bin/python3.11")
    systemd.install(picture, command=named)
    assert f"ExecStart={named} install" in (picture / systemd.UNITS / systemd.SERVICE).read_text()


@pytest.mark.parametrize(
    ("name", "why"),
    [("usr/bin/tpctl", "is not executable"), ("usr/bin", "is not a file"), ("usr/sbin/tpctl", "does not exist")],
)
def test_a_command_that_cannot_run_is_refused(picture: Path, name: str, why: str) -> None:
    (picture / "usr/bin/tpctl").write_text("")
    before = tree(picture)
    with pytest.raises(InputError, match=f"--command /{name}: {picture}/{name} {why}"):
        systemd.install(picture, command=f"/{name}")
    with pytest.raises(InputError, match="not an absolute path"):
        systemd.install(picture, command="tpctl")
    with pytest.raises(InputError, match="is not executable"):
        systemd.install(picture)
    assert tree(picture) == before


def test_nothing_outside_is_read_or_written(picture: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("builder")
    for name in ("system", "tpctl"):
        (outside / name).mkdir()
    (outside / "tpctl/config.yaml").write_text("kumaDPUser: kuma-dp\n")
    program(outside, "tpctl/tpctl")
    (picture / "etc/tpctl/config.yaml").unlink()
    (picture / "etc/tpctl").rmdir()
    (picture / "etc/tpctl").symlink_to(outside / "tpctl")
    (picture / "etc/systemd").mkdir()
    (picture / "etc/systemd/system").symlink_to(outside / "system")
    (picture / "usr/bin/tpctl").symlink_to(outside / "tpctl/tpctl")
    before = tree(outside)
    with pytest.raises(InputError, match=f"{picture}/etc/tpctl/config.yaml does not exist"):
        systemd.install(picture)
    inside = picture / outside.relative_to("/")
    (inside / "system").mkdir(parents=True)
    program(picture, str(outside.relative_to("/") / "tpctl/config.yaml"), "kumaDPUser: kuma-dp\n")
    with pytest.raises(InputError, match="there is no tpctl in"):
        systemd.install(picture)
    program(picture, str(outside.relative_to("/") / "tpctl/tpctl"))
    systemd.install(picture)
    assert (inside / "system" / systemd.SERVICE).is_file()
    assert systemd.is_enabled(picture)
    assert outlook.next_boot(picture)[0] == f"tpctl.service installs what {picture}/etc/tpctl/config.yaml says"
    assert systemd.remove(picture)
    assert list((inside / "system").rglob("*tpctl*")) == []
    assert tree(outside) == before


@needs_root
def test_the_command_speaks_of_the_image(picture: Path) -> None:
    program(picture, "usr/bin/tpctl")
    done = CliRunner().invoke(persist.command, ["--systemd", "--root", f"{picture}/usr/.."])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert f"wrote {picture}/etc/systemd/system/tpctl.service" in lines
    assert f"enabled tpctl.service in {picture}" in lines
    assert f"next boot: tpctl.service installs what {picture}/etc/tpctl/config.yaml says" in lines
    done = CliRunner().invoke(persist.command, ["--remove", "--root", str(picture)])
    assert f"removed {picture}/etc/systemd/system/tpctl.service" in done.output
    refused = CliRunner().invoke(persist.command, ["--remove", "--command", "/usr/bin/tpctl"])
    assert isinstance(refused.exception, InputError)


@analyzed
@pytest.mark.parametrize("folder", ["srv/a b", "srv/50%n", "srv/50%  of"])
def test_systemd_finds_a_command_in_a_folder_of_any_name(picture: Path, folder: str) -> None:
    command = f"{folder}/tpctl"
    program(picture, command)
    program(picture, "bin/kill")
    (picture / "usr/lib/systemd/system/kuma-dp.service").write_text("[Service]\nExecStart=/bin/kill\n")
    systemd.install(picture, command=f"/{command}")
    for unit in (systemd.SERVICE, systemd.RELAY, "kuma-dp.service"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", f"--root={picture}", unit],
            capture_output=True,
            text=True,
            check=False,
        )
        ours = [line for line in (done.stdout + done.stderr).splitlines() if "Exec" in line or "Command" in line]
        assert ours == []
    (picture / command).rename(picture / "other")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={picture}", systemd.SERVICE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"/{command}" in done.stderr, "the silence above means nothing"


@pytest.mark.parametrize("folder", ['srv/"off"', "srv/back\\slash", "srv/d'or", "srv/two\nlines"])
def test_a_command_that_systemd_does_not_run_is_refused(picture: Path, folder: str) -> None:
    program(picture, f"{folder}/tpctl")
    before = tree(picture)
    with pytest.raises(HostError, match="a unit file cannot name"):
        systemd.install(picture, command=f"/{folder}/tpctl")
    assert tree(picture) == before

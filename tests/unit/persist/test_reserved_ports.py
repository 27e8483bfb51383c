"""The file of sysctl.d that reserves the data plane's ports: beside other files, in an image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hidden import ROOT_DIRECTORY
from tpctl.host.local_ports import LocalPorts, listing, merged, parse_ports, without
from tpctl.persist.reserved_ports import FILE, release, reserve
from tpctl.spec.policy import PortRange

PORTS = (15006, 15001)
NAME = "net.ipv4.ip_local_reserved_ports"


def setting(root: Path) -> str:
    """What our file sets, beside comments."""
    (line,) = [line for line in (root / FILE).read_text().splitlines() if not line.startswith("#")]
    name, _, value = line.partition(" = ")
    assert name == "net.ipv4.ip_local_reserved_ports"
    return value


def write(root: Path, place: str, text: str) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(text)


def test_alone(tmp_path: Path) -> None:
    assert reserve(tmp_path, PORTS) == (f"wrote {tmp_path / FILE}",)
    assert setting(tmp_path) == "15001,15006"
    assert reserve(tmp_path, PORTS) == ()
    assert release(tmp_path, dry_run=True) == (str(tmp_path / FILE),)
    assert release(tmp_path) == (str(tmp_path / FILE),)
    assert release(tmp_path) == ()


@pytest.mark.parametrize(
    ("files", "value"),
    [
        ({"etc/sysctl.d/10-a.conf": "net.ipv4.ip_local_reserved_ports = 8080,15006"}, "8080,15001,15006"),
        ({"etc/sysctl.conf": "net/ipv4/ip_local_reserved_ports=9000-9010\r\n"}, "9000-9010,15001,15006"),
        # The last in the order of names wins, wherever it lies; of two of a name, the one in /etc.
        ({"usr/lib/sysctl.d/50-b.conf": "-net.ipv4.ip_local_reserved_ports=1", "etc/sysctl.d/10-a.conf":
          "net.ipv4.ip_local_reserved_ports=2"}, "1,15001,15006"),
        ({"usr/lib/sysctl.d/50-b.conf": "net.ipv4.ip_local_reserved_ports=1", "etc/sysctl.d/50-b.conf": "# none"},
         "15001,15006"),
        ({"etc/sysctl.d/10-a.conf": f"{NAME}=1\n{NAME} = 14999-15010"},
         "14999-15010"),
        ({"etc/sysctl.d/10-a.conf": f"; {NAME}=1\nnet.ipv4.ip_local_port_range=1 2"}, "15001,15006"),
        ({"etc/sysctl.d/10-a.conf": "net.ipv4.ip_local_reserved_ports = nonsense"}, "15001,15006"),
    ],
)  # fmt: skip
def test_what_others_reserve_stays_reserved(tmp_path: Path, files: dict[str, str], value: str) -> None:
    for place, text in files.items():
        write(tmp_path, place, text)
    reserve(tmp_path, PORTS)
    assert setting(tmp_path) == value
    release(tmp_path)
    assert {place: (tmp_path / place).read_text() for place in files} == {
        place: text.replace("\r\n", "\n") for place, text in files.items()
    }


def test_lists_of_ports() -> None:
    ports = parse_ports("20000-20010,15001\n")
    assert listing(merged(ports, (PortRange(15002), PortRange(20005, 20020)))) == "15001-15002,20000-20020"
    assert listing(without(ports, [20000, 20005, 15001, 7])) == "20001-20004,20006-20010"
    assert parse_ports("\n") == ()
    local = LocalPorts(PortRange(15000, 15010), parse_ports("15001"))
    assert local.at_risk([15001, 15006, 16000, 15006]) == (15006,)
    assert LocalPorts(None).at_risk([15001]) == ()


# A network namespace whose first process is here, and files of its own.
APART = """
set -e
mount -t tmpfs none /etc/sysctl.d
mount -t tmpfs none /run
echo "net.ipv4.ip_local_reserved_ports = 9000" > /etc/sysctl.d/10-mine.conf
echo 9000,9001,15006 > /proc/sys/net/ipv4/ip_local_reserved_ports
tpctl() { "$1" -m tpctl.cli.main persist "$2"; }
tpctl "$1" --reserve-ports 2>&1 || echo "refused"
ip link set lo up
"$1" -m tpctl.cli.main install --kuma-dp-user nobody --redirect-outbound-port 15007 >/dev/null 2>&1
for flag in --reserve-ports --reserve-ports --remove; do
  tpctl "$1" $flag
  cat /proc/sys/net/ipv4/ip_local_reserved_ports
done
ls /etc/sysctl.d
"""


@pytest.mark.root
@pytest.mark.skipif(
    not Path("/etc/sysctl.d").is_dir(), reason="there is no /etc/sysctl.d to put another one in place of"
)
def test_the_running_kernel_and_back() -> None:
    """Ports that somebody has reserved without a file stay as they are."""
    argv = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", APART, "sh", sys.executable]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT_DIRECTORY)
    lines = [line for line in done.stdout.splitlines() if "next boot" not in line]
    assert "--reserve-ports: nothing is installed here" in lines[0]
    assert lines[1:] == [
        "refused",
        "wrote /etc/sysctl.d/99-tpctl.conf",
        "net.ipv4.ip_local_reserved_ports is 9000-9001,15006-15007 now",
        "9000-9001,15006-15007",
        "9000-9001,15006-15007",
        "removed /etc/sysctl.d/99-tpctl.conf",
        "9000-9001,15006",
        "10-mine.conf",
    ]

"""A Vagrant box for the libvirt provider, packed from the same recipe as the images of the tests.

`python -m tests.vm.box [release...]` packs bookworm, or the releases that are named, and says where the boxes are. A
box is an archive of

    metadata.json   what vagrant-libvirt asks for: the provider, the format and the size
    Vagrantfile     settings that every machine of this box needs
    box.img         qcow2: the image's file system, which begins with GRUB's first sector and is followed by the rest of
                    GRUB. There is no partition table, so the disk is /dev/vda as in the tests

libvirt's daemon does not run as the user whose home directory has the box, and often cannot read a kernel there: that
is why the disk boots by itself. Beside what the images have, a box has the user `vagrant`, who may use sudo, and takes
its addresses from DHCP. Needs what the images need, and grub-pc-bin and qemu-utils.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.vm import debian
from tests.vm.images import Image, Recipe, image

MADE = debian.KEPT / "boxes"
GIGABYTES = 4
"""The disk's size: the file system, GRUB, and room that nobody uses."""
INSECURE_KEY = (
    "ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEFHzD8+v1I2YJ6oXev"
    "ct1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8HfdOV0IAdx4O7PtixWKn5y2hMNG0zQP"
    "yUecp4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEnDkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF"
    "96hrucXzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ== vagrant insecure public key"
)
"""The key that Vagrant logs in with for the first time, and then replaces by one of its own (keys/ in its sources)."""
_PACKAGES = ("rsync", "sudo")
_SCRIPT = f"""\
useradd --create-home --shell /bin/bash vagrant
install -d -m 700 -o vagrant -g vagrant /home/vagrant/.ssh
echo '{INSECURE_KEY}' >/home/vagrant/.ssh/authorized_keys
chown vagrant: /home/vagrant/.ssh/authorized_keys
chmod 600 /home/vagrant/.ssh/authorized_keys
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/vagrant
chmod 440 /etc/sudoers.d/vagrant
# Every machine of a box has the same identity, but not the same hardware address.
cat >/etc/systemd/network/40-vagrant.network <<'NETWORK'
[Match]
Driver=virtio_net
[Network]
DHCP=ipv4
Address=fd15::15/64
IPv6AcceptRA=no
[DHCPv4]
ClientIdentifier=mac
UseDNS=no
NETWORK
ln -s "$(cd /boot && ls vmlinuz-* | tail -n 1)" /boot/vmlinuz
"""
_GRUB = Path("/usr/lib/grub/i386-pc")
_GRUB_MODULES = ("biosdisk", "boot", "ext2", "linux")
_GRUB_SETTINGS = """\
linux (hd0)/boot/vmlinuz root=/dev/vda console=tty0 console=ttyS0 quiet panic=-1 mitigations=off audit=0
initrd (hd0)/boot/initrd
boot
"""
_VAGRANTFILE = """\
Vagrant.configure("2") do |config|
  # There is nobody to share a directory with: NFS, the provider's default, would have to be set up on the host.
  config.vm.synced_folder ".", "/vagrant", disabled: true
  config.vm.provider :libvirt do |libvirt|
    libvirt.disk_bus = "virtio"
    libvirt.memory = 1024
  end
end
"""
_SECTOR = 512
_WHERE_REST_IS = 0x5C
"""boot.img: the sector at which the rest of GRUB begins, eight bytes (GRUB_BOOT_MACHINE_KERNEL_SECTOR)."""
_WHERE_LIST_IS = 0x1F4
"""The first sector of the rest: where the others begin, eight bytes (struct grub_pc_bios_boot_blocklist)."""


def recipe(release: str) -> Recipe:
    """An image of the tests, with what Vagrant needs in it."""
    return Recipe(release, packages=_PACKAGES, script=_SCRIPT)


def box(release: str) -> Path:
    """Pack the box of a release. Raises RuntimeError with what the failed step said."""
    made = MADE / f"tpctl-{release}.box"
    MADE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="packing-", dir=MADE) as name:
        work = Path(name)
        disk = bootable(image(recipe(release)), work)
        _run("qemu-img", "convert", "-O", "qcow2", str(disk), str(work / "box.img"))
        _run("qemu-img", "resize", "-q", str(work / "box.img"), f"{GIGABYTES}G")
        about = {"provider": "libvirt", "format": "qcow2", "virtual_size": GIGABYTES}
        (work / "metadata.json").write_text(json.dumps(about) + "\n")
        (work / "Vagrantfile").write_text(_VAGRANTFILE)
        members = ("metadata.json", "Vagrantfile", "box.img")
        _run(
            "tar",
            "--create",
            "--use-compress-program=gzip -1",
            "--file",
            str(work / made.name),
            "--directory",
            str(work),
            *members,
        )
        (work / made.name).rename(made)
    return made


def bootable(made: Image, work: Path) -> Path:
    """A copy of an image's disk, raw, that a BIOS boots: GRUB loads the kernel and the initrd from its file system."""
    disk = work / "disk.raw"
    _run("cp", "--sparse=always", str(made.disk), str(disk))
    _run("debugfs", "-w", "-R", f"write {made.initrd} boot/initrd", str(disk))
    (work / "grub.cfg").write_text(_GRUB_SETTINGS)
    words = ["grub-mkimage", "--format=i386-pc", "--prefix=(hd0)/boot/grub", f"--config={work}/grub.cfg"]
    _run(*words, f"--output={work}/core.img", *_GRUB_MODULES)
    end = disk.stat().st_size
    first, rest = bytearray((_GRUB / "boot.img").read_bytes()), bytearray((work / "core.img").read_bytes())
    struct.pack_into("<Q", first, _WHERE_REST_IS, end // _SECTOR)
    struct.pack_into("<Q", rest, _WHERE_LIST_IS, end // _SECTOR + 1)
    with disk.open("r+b") as file:
        file.write(first)  # ext4 leaves the first 1024 bytes alone
        file.seek(end)
        file.write(rest)
        file.truncate(-(-file.tell() // _SECTOR) * _SECTOR)
    return disk


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"[-8000:])


def main() -> None:
    """Pack, and say where the boxes are and how long it took."""
    for release in sys.argv[1:] or ["bookworm"]:
        begin = time.monotonic()
        made = box(release)
        print(f"{made} ({made.stat().st_size >> 20} MB, {time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

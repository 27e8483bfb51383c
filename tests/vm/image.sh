#!/bin/sh
# Runs inside a new root file system, as its root: users, network, ssh, and a Python environment for tpctl.
# /seed has what came from outside: wheels, and a Python where the release's own is too old.
set -eu

useradd --system --uid 5678 --user-group --no-create-home --shell /usr/sbin/nologin kuma-dp
useradd --uid 1000 --create-home --shell /bin/bash app

echo tpctl-vm >/etc/hostname
printf '127.0.0.1 localhost tpctl-vm\n::1 localhost\n' >/etc/hosts
echo '/dev/vda / ext4 errors=remount-ro 0 1' >/etc/fstab
systemd-machine-id-setup >/dev/null # otherwise the first boot would enable every service there is

# qemu's user network. The name servers are addresses that only a test's peer answers for.
cat >/etc/systemd/network/50-uplink.network <<'NETWORK'
[Match]
Driver=virtio_net
[Network]
Address=10.0.2.15/24
Address=fd15::15/64
IPv6AcceptRA=no
[Route]
Gateway=10.0.2.2
Metric=1024
NETWORK
rm -f /etc/resolv.conf
printf 'nameserver 192.0.2.53\nnameserver 2001:db8::53\n' >/etc/resolv.conf
systemctl enable --quiet systemd-networkd.service
systemctl enable --quiet ssh.service

install -d -m 700 /root/.ssh
printf 'UseDNS no\nPermitRootLogin prohibit-password\n' >/etc/ssh/sshd_config.d/tpctl-vm.conf

# Installed, but a scenario's own to start.
systemctl disable --quiet firewalld.service nftables.service 2>/dev/null || true
# None of this is looked at by a test, and an emulated processor takes seconds for it.
systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer dev-hugepages.mount dev-mqueue.mount \
    dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer getty@tty1.service \
    kmod-static-nodes.service logrotate.timer man-db.timer modprobe@configfs.service modprobe@dm_mod.service \
    modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service modprobe@loop.service \
    serial-getty@ttyS0.service sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    systemd-binfmt.service systemd-journal-flush.service systemd-network-generator.service systemd-pstore.service \
    systemd-random-seed.service systemd-sysusers.service systemd-timesyncd.service systemd-udev-settle.service \
    systemd-update-utmp.service systemd-update-utmp-runlevel.service
# Nor is it needed that udev looks at every device there is.
mkdir -p /etc/systemd/system/systemd-udev-trigger.service.d
cat >/etc/systemd/system/systemd-udev-trigger.service.d/few.conf <<'TRIGGER'
[Service]
ExecStart=
ExecStart=udevadm trigger --action=add --subsystem-match=pci --subsystem-match=virtio --subsystem-match=net --subsystem-match=block
TRIGGER

[ ! -d /seed/python ] || cp -a /seed/python/. /
python=/usr/bin/python3
[ ! -x /usr/local/bin/python3.11 ] || python=/usr/local/bin/python3.11
$python -m venv --system-site-packages /opt/tpctl
/opt/tpctl/bin/python -m pip install --quiet --no-index --find-links /seed/wheels $(cat /seed/requirements)
# bcc and libnftables' bindings exist only as packages of the distribution's Python.
echo /usr/lib/python3/dist-packages >"$(echo /opt/tpctl/lib/python3*/site-packages)/distribution.pth"
ln -s /opt/tpctl/bin/tpctl /usr/local/bin/tpctl

install -m 755 /seed/envoy /usr/local/bin/envoy
rm -rf /seed /var/cache/apt/* /var/lib/apt/lists/*

#!/bin/sh
# confined.sh COMMAND...: a command beside a libvirt daemon of its own, in namespaces of its own.
#
# libvirt makes bridges, packet filter rules, control groups and files under /var/lib and /run. Here all of that happens
# in namespaces of the network, of mounts and of processes that end with the command; the machine that runs this keeps
# nothing but what is under $KEPT: Vagrant's boxes, and the disks of machines that were not destroyed. A machine that
# is running when the command ends loses its power. Without KVM. Needs root.
set -eu
KEPT=${KEPT:-/var/tmp/tpctl-vm/vagrant}
export KEPT

if [ "${1:-}" != --inside ]; then
    mkdir -p "$KEPT/etc" "$KEPT/lib" "$KEPT/log" "$KEPT/home" "$KEPT/dot"
    group=/sys/fs/cgroup/unified
    [ -d $group ] || group=/sys/fs/cgroup
    group=$group/tpctl-vagrant.$$
    mkdir "$group"
    exec 3<&0 # a command in the background would read nothing
    # The group is entered by a child: this shell must be outside when it is removed.
    sh -c 'echo $$ >"$0/cgroup.procs" && exec unshare --net --mount --pid --ipc --fork --kill-child --mount-proc "$@"' \
        "$group" "$0" --inside "$@" <&3 &
    trap 'kill -KILL $!' HUP INT TERM # and with it everything in its namespace of processes
    wait $! && status=0 || status=$?
    until rmdir "$group" 2>/dev/null; do sleep 0.1; done
    exit $status
fi
shift

mount --make-rprivate /
mount -t sysfs sysfs /sys # of this network; and without control groups, which libvirt then does without
for place in /run/libvirt /var/cache/libvirt; do
    mkdir -p $place
    mount -t tmpfs tmpfs $place
done
mkdir -p /var/lib/libvirt /var/log/libvirt /etc/libvirt
mount --bind "$KEPT/etc" /etc/libvirt
mount --bind "$KEPT/lib" /var/lib/libvirt
mount --bind "$KEPT/log" /var/log/libvirt
if ! getent passwd libvirt-qemu >/dev/null; then # the daemon looks its default user up, whatever the settings say
    { cat /etc/passwd && echo 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin'; } >"$KEPT/passwd"
    { cat /etc/group && echo 'libvirt-qemu:x:64055:'; } >"$KEPT/group"
    mount --bind "$KEPT/passwd" /etc/passwd
    mount --bind "$KEPT/group" /etc/group
fi
ip link set lo up
cat >/etc/libvirt/qemu.conf <<'CONF'
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
CONF
cat >/etc/libvirt/libvirtd.conf <<'CONF'
auth_unix_rw = "none"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
CONF
libvirtd --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid &
until virsh --connect qemu:///system version >/dev/null 2>&1; do
    kill -0 $! # or it has gone
    sleep 0.2
done
export VAGRANT_HOME="$KEPT/home" VAGRANT_DOTFILE_PATH="$KEPT/dot" VAGRANT_CHECKPOINT_DISABLE=1
"$@"

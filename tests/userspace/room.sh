#!/bin/sh
# room.sh CHROOT LAYER CHECKOUT COMMAND...: run a command in a chroot, in mount and process namespaces of its own, which
# end with it however it ends. What it writes goes to LAYER. SHARED lists files and folders of this machine that are there
# as well, one a line: pip's settings name them.
set -eu
chroot=$1 layer=$2 checkout=$3
shift 3
root=$layer/root
mkdir -p "$layer/written" "$layer/work" "$root"
mount -t overlay overlay -o "lowerdir=$chroot,upperdir=$layer/written,workdir=$layer/work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys" # with the BPF file system and the control groups
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/checkout" "$root/tpctl" "$root/run/lock"
mount --bind "$checkout" "$root/checkout"
mount -o remount,bind,ro "$root/checkout"
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
printf '%s\n' "$SHARED" | while read -r path; do
    [ -n "$path" ] && [ -e "$path" ] || continue
    if [ -d "$path" ]; then
        mkdir -p "$root$path"
    else
        mkdir -p "$root${path%/*}"
        [ -e "$root$path" ] || : >"$root$path"
    fi
    mount --bind "$path" "$root$path"
    mount -o remount,bind,ro "$root$path"
done
unset SHARED
chroot "$root" "$@" # no exec: as the first process, the shell takes care of those whose parents have ended

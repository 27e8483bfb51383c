#!/bin/sh
# image.sh IMAGE NAME WORK NAMESPACE: the image as podman runs it, one container for each command, with the record of what
# is installed in a folder of the host's. Ends at the first thing that is not as it should be. Called in namespaces of
# its own: NAMESPACE is the network namespace that it must not be in.
set -eu
image=$1 name=$2 work=$3
[ "$(readlink /proc/self/ns/net)" != "$4" ] || exit 1
ip link set lo up
ip address add 192.0.2.1/24 dev lo
# crun wants one kind of cgroups, and makes none here.
mount -t tmpfs cgroups /sys/fs/cgroup
mount -t cgroup2 cgroups /sys/fs/cgroup

pod() {
    podman --root "$work/storage" --runroot "$work/run" --tmpdir "$work/tmp" --storage-driver vfs --runtime crun \
        --cgroup-manager cgroupfs --log-level error "$@"
}
in_a_container() { pod run --rm --cgroups disabled --log-driver none "$@"; }
on_the_host() {
    in_a_container --network host --cap-add NET_ADMIN --volume "$work/state:/run/tpctl" "$name" "$@"
}
mkdir "$work/state"
pod load --quiet --input "$image"
nft list ruleset >"$work/rules"

in_a_container --network none --privileged "$name" verify --kuma-dp-user kuma-dp --exclude-inbound-ports 22 | grep '^all '
on_the_host relay --user kuma-dp >"$work/relay" 2>&1 &
relay=$!
for _ in $(seq 300); do
    ss -Hltn 'sport = :15001' | grep -q . && break
    sleep 0.2
done
ss -Hltn 'sport = :15001' | grep -q . || { cat "$work/relay" && exit 1; }
on_the_host install --kuma-dp-user kuma-dp --exclude-inbound-ports 22
nft list tables | grep -qx 'table inet tpctl'
on_the_host status
in_a_container --network host --privileged --volume "$work/state:/run/tpctl" "$name" check
on_the_host uninstall
kill "$relay" # podman passes it on
wait "$relay" || true
nft list ruleset | cmp - "$work/rules"
[ -z "$(find "$work/state" -type f -not -name '*.lock')" ]
echo "== all of it held"

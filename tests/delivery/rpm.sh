#!/bin/sh
# rpm.sh RPM: the tree of the RPM package in a Debian that has Python 3.11: no host of the RHEL 9 family is here. Ends at
# the first thing that is not as it should be.
set -eu
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
apt-get update -qq
apt-get install -y -qq --no-install-recommends python3 python3-yaml nftables iproute2 rpm2cpio cpio >/dev/null 2>&1
rpm2cpio "$1" | cpio --extract --make-directories --quiet --directory /
! dpkg-query --show python3-click 2>/dev/null || exit 1
tpctl --version
: >/tmp/net
unshare --net=/tmp/net ip link set lo up
alone() { nsenter --net=/tmp/net "$@"; }
alone tpctl verify --kuma-dp-user nobody --exclude-inbound-ports 22 | tail -n 1
alone tpctl relay --user nobody >/tmp/relay 2>&1 &
relay=$!
for _ in $(seq 300); do
    alone ss -Hltn 'sport = :15001' | grep -q . && break
    sleep 0.2
done
alone tpctl install --kuma-dp-user nobody --exclude-inbound-ports 22 --confirm-within 600s | head -n 1
alone tpctl confirm
alone tpctl check
alone tpctl uninstall
kill $relay
/usr/lib/tpctl/bin/python -I -m compileall -q /usr/lib/tpctl/lib
echo "== all of it held"

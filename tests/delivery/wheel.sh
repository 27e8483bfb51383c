#!/bin/sh
# wheel.sh WHEEL: what a user of pip does, in a bare Debian without a compiler: installs, verifies, installs the
# redirection, uninstalls. Ends at the first thing that is not as it should be.
set -eu
export DEBIAN_FRONTEND=noninteractive PATH=/opt/tpctl/bin:/usr/sbin:/usr/bin:/sbin:/bin
apt-get update -qq
apt-get install -y -qq --no-install-recommends python3-venv nftables iproute2 >/dev/null 2>&1
! command -v cc gcc || exit 1
python3 -m venv /opt/tpctl
pip install --quiet --disable-pip-version-check "$1"
: >/tmp/net
unshare --net=/tmp/net ip link set lo up
alone() { nsenter --net=/tmp/net "$@"; }
alone nft list ruleset >/tmp/rules
alone tpctl verify --kuma-dp-user nobody --exclude-inbound-ports 22 | tail -n 1
alone tpctl install --kuma-dp-user nobody --exclude-inbound-ports 22 --no-probe 2>/dev/null | head -n 1
alone nft list table inet tpctl >/dev/null
alone tpctl uninstall
alone nft list ruleset | cmp - /tmp/rules
pip uninstall --quiet --yes tpctl
find /opt/tpctl -name '*tpctl*' -not -path /opt/tpctl | sed 's/^/left: /'
echo "== all of it held"

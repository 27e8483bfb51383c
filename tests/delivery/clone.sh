#!/bin/sh
# clone.sh: `make demo` as a user runs it in a clone, in a bare Debian: under /tmp, with blanks in the path, in a folder
# that other users cannot read, with PYTHONDONTWRITEBYTECODE=1. No compiler comes along. Then the relay, whose user may
# not look into the clone, and a redirection. Ends at the first thing that is not as it should be.
set -eu
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
apt-get update -qq
apt-get install -y -qq --no-install-recommends make >/dev/null 2>&1
place="/tmp/a clone/of tpctl"
mkdir -p "$place"
chmod 700 "/tmp/a clone"
cp -a /tpctl/. "$place"
cd "$place"
make demo | tail -n 1
! command -v cc gcc || exit 1
! ls .venv/bin/pytest .venv/bin/mypy .venv/bin/envoy 2>/dev/null || exit 1
du -sm .venv
.venv/bin/tpctl verify --kuma-dp-user nobody --exclude-inbound-ports 22 | tail -n 1
: >/tmp/net
unshare --net=/tmp/net ip link set lo up
alone() { nsenter --net=/tmp/net .venv/bin/tpctl "$@"; }
alone relay --user nobody >/tmp/relay 2>&1 &
relay=$!
for _ in $(seq 300); do
    grep -q '"ready"' /tmp/relay && break
    sleep 0.2
done
alone install --kuma-dp-user nobody --exclude-inbound-ports 22
alone check
alone uninstall
kill $relay
wait $relay || true
echo "== all of it held"

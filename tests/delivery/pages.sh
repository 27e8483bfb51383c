#!/bin/sh
# pages.sh DEB: what a stranger does in a bare Debian: installs the package as the tutorial says, and types README and
# the tutorial, which have to print what they say. In namespaces of their own, but for apt's way to its mirror.
set -eu
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
begin=$(date +%s)
apt-get update -qq
apt-get install -y -qq "$1" curl >/dev/null 2>&1
useradd --system --no-create-home kuma-dp
echo "== installed after $(($(date +%s) - begin)) s"
apt-get install -y -qq iproute2 procps >/dev/null 2>&1 # of the machines that are made of namespaces
begin=$(date +%s)
python3 -m tests.pages --check README.md docs/tutorial-relay.md
echo "== typed after $(($(date +%s) - begin)) s"
echo "== all of it held"

#!/bin/sh
# debian.sh DEB: what a user does with the package, in a bare Debian: installs it as apt does, reads its manual, completes
# words, verifies, installs, looks, uninstalls, boots, removes and purges. Ends at the first thing that is not as it
# should be. In a network namespace of its own, but for apt's way to its mirror.
set -eu
deb=$1
export DEBIAN_FRONTEND=noninteractive TERM=dumb PATH=/usr/sbin:/usr/bin:/sbin:/bin

said() { echo "== $*"; }
fail() { echo "FAILED: $*" && exit 1; }
# What is on disk, but for what apt and dpkg write of their own, and the modules that Python has compiled.
listed() {
    find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /tpctl -o -path /checkout \
        -o -path /var/lib/apt -o -path /var/lib/dpkg -o -path /var/cache -o -path /var/log -o -name __pycache__ \) \
        -prune -o -print | sort
}
alone() { nsenter --net=/tmp/net "$@"; }

apt-get update -qq
apt-get install -y -qq man-db bash-completion systemd iproute2 procps >/dev/null 2>&1
printf 'kuma-dp:x:5678:5678::/:/usr/sbin/nologin\n' >>/etc/passwd

said "apt install $deb"
apt-get install -y "$deb" 2>&1 | tail -n 3
dpkg --audit
[ -d /usr/lib/python3/dist-packages/tpctl/__pycache__ ] || fail "nothing was compiled"
apt-get purge -y tpctl >/dev/null
listed >/tmp/before
apt-get install -y -qq "$deb" >/dev/null 2>&1
for package in python3-click python3-structlog python3-pyroute2 python3-yaml python3-dnspython python3-nftables nftables iptables; do
    dpkg-query --show "$package"
done
! dpkg-query --show gcc 2>/dev/null || fail "a compiler came along"

said "man"
for page in tpctl tpctl-install tpctl-explain-outbound; do
    MANPAGER=cat man "$page" >/tmp/page
    grep -q '^SEE ALSO' /tmp/page || fail "man $page"
done
grep -q -- '--to ADDRESS:PORT' /tmp/page || fail "man $page"

said "completion"
bash -c '
    . /usr/share/bash-completion/bash_completion
    { declare -F _comp_load >/dev/null && _comp_load tpctl; } || _completion_loader tpctl || true
    COMP_WORDS=(tpctl install --engine n) COMP_CWORD=3
    $(complete -p tpctl | sed "s/.*-F \([^ ]*\).*/\1/") tpctl n
    echo "${COMPREPLY[*]}"
' | grep -qx nftables || fail "completion"

said "units"
systemd-analyze verify tpctl.service tpctl-relay.service tpctl-relay.socket tpctl-resolv.path tpctl-order.service

: >/tmp/net
unshare --net=/tmp/net true
alone ip link set lo up
alone ip address add 192.0.2.1/24 dev lo
alone nft list ruleset >/tmp/rules

said "the quick start"
alone tpctl verify --kuma-dp-user nobody --exclude-inbound-ports 22 | tail -n 1
alone tpctl relay --user nobody --metrics 127.0.0.1:9902 >/tmp/relay 2>&1 &
relay=$!
for _ in $(seq 300); do
    alone ss -Hltn 'sport = :15001' | grep -q . && break
    sleep 0.2
done
alone ss -Hltn 'sport = :15001' | grep -q . || { cat /tmp/relay && fail "no relay"; }
alone tpctl install --kuma-dp-user nobody --exclude-inbound-ports 22
alone tpctl status
alone tpctl check
alone tpctl explain outbound --uid 1000 --to 10.1.2.3:443
alone tpctl top --metrics 127.0.0.1:9902 --once | head -n 1
alone tpctl uninstall
kill $relay
wait $relay || true
alone nft list ruleset | cmp - /tmp/rules
for engine in iptables nftables; do
    alone tpctl verify --config /etc/tpctl/config.yaml.example --engine $engine | tail -n 1
done

said "removed while installed"
cp /etc/tpctl/config.yaml.example /etc/tpctl/config.yaml
alone tpctl install --config /etc/tpctl/config.yaml --no-probe >/dev/null 2>&1
alone nft list table inet tpctl >/tmp/rules
tpctl persist --systemd
[ -e /etc/systemd/system/tpctl.service ] || fail "no unit"
alone apt-get remove -y tpctl >/tmp/removed
grep '^tpctl:' /tmp/removed
grep -q 'the redirection stays' /tmp/removed && grep -q 'its units' /tmp/removed || fail "nothing was said"
alone nft list table inet tpctl | cmp - /tmp/rules
! ls /etc/systemd/system/*tpctl* /etc/systemd/system/*.wants/tpctl* 2>/dev/null || fail "a unit is left"
[ -e /etc/tpctl/config.yaml ] || fail "the configuration is gone"
apt-get install -y -qq "$deb" >/dev/null 2>&1
alone tpctl uninstall | head -n 1

said "purged"
tpctl persist --systemd >/dev/null
echo "net.ipv4.ip_local_reserved_ports = 15001" >/etc/sysctl.d/99-tpctl.conf # what `persist --reserve-ports` writes
mkdir -p /var/cache/tpctl
apt-get purge -y tpctl >/dev/null
listed | diff /tmp/before - || fail "something is left, or gone"
[ ! -e /run/tpctl ] || fail "/run/tpctl is left"
said "all of it held"

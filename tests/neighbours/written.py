"""Neighbours that the distribution does not have, or that cannot run here: rules as they install them, written anew."""

from __future__ import annotations

from tests.neighbours.catalogue import Neighbour, Outgoing

_BOTH = "for t in iptables ip6tables; do"

_TAILSCALE = f"""
ip link show tailscale0 >/run/shown 2>&1 || {{
    ip tuntap add tailscale0 mode tun; ip link set tailscale0 up
    ip address add 100.101.102.103/32 dev tailscale0; ip -6 address add fd7a:115c:a1e0::1/128 dev tailscale0 nodad
}}
for f in -4 -6; do
    ip $f rule add priority 5210 fwmark 0x80000/0xff0000 lookup main
    ip $f rule add priority 5230 fwmark 0x80000/0xff0000 lookup default
    ip $f rule add priority 5250 fwmark 0x80000/0xff0000 unreachable
    ip $f rule add priority 5270 lookup 52
done
ip route replace 100.64.0.0/10 dev tailscale0 table 52; ip -6 route replace fd7a:115c:a1e0::/48 dev tailscale0 table 52
{_BOTH} for c in ts-input ts-forward; do $t -N $c; done; $t -t nat -N ts-postrouting; done
iptables -A ts-input -s 100.101.102.103/32 -i lo -j ACCEPT
ip6tables -A ts-input -s fd7a:115c:a1e0::1/128 -i lo -j ACCEPT
iptables -A ts-input -s 100.115.92.0/23 ! -i tailscale0 -j RETURN
iptables -A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP
{_BOTH}
    $t -A ts-input -i tailscale0 -j ACCEPT; $t -A ts-input -p udp -m udp --dport 41641 -j ACCEPT
    $t -A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
    $t -A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT; $t -A ts-forward -o tailscale0 -j ACCEPT
    $t -t nat -A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
    $t -I INPUT -j ts-input; $t -I FORWARD -j ts-forward; $t -t nat -I POSTROUTING -j ts-postrouting
done
"""
_TAILSCALE_END = f"""
for f in -4 -6; do for p in 5210 5230 5250 5270; do ip $f rule delete priority $p; done; done
{_BOTH}
    $t -D INPUT -j ts-input; $t -D FORWARD -j ts-forward; $t -t nat -D POSTROUTING -j ts-postrouting
    for c in ts-input ts-forward; do $t -F $c; $t -X $c; done; $t -t nat -F ts-postrouting; $t -t nat -X ts-postrouting
done
"""
TAILSCALE = Neighbour(
    "tailscale", "tailscale",
    start=_TAILSCALE,
    restart=_TAILSCALE_END + _TAILSCALE,
    outgoing=(
        Outgoing("100.99.0.5", source="100.101.102.103"),
        Outgoing("fd7a:115c:a1e0::5", source="fd7a:115c:a1e0::1"),
    ),
)  # fmt: skip

_KUBE_PROXY = """
for t in iptables ip6tables; do
    $t -t nat -N KUBE-SERVICES; $t -t nat -N KUBE-MARK-MASQ; $t -t nat -N KUBE-SVC-API; $t -t nat -N KUBE-SEP-API
    $t -t nat -N KUBE-NODEPORTS; $t -t nat -N KUBE-POSTROUTING; $t -N KUBE-FIREWALL; $t -N KUBE-SERVICES
    $t -t nat -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
    $t -t nat -A KUBE-SVC-API -j KUBE-SEP-API
    $t -t nat -A KUBE-SERVICES -m comment --comment "kubernetes service nodeports" -m addrtype --dst-type LOCAL \\
        -j KUBE-NODEPORTS
    $t -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
    $t -t nat -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0; $t -t nat -A KUBE-POSTROUTING -j MASQUERADE
    for c in PREROUTING OUTPUT; do
        $t -t nat -I $c -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
    done
    $t -t nat -I POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
    $t -I INPUT -j KUBE-FIREWALL; $t -I OUTPUT -j KUBE-FIREWALL
    $t -I OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
done
iptables -A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" \\
    -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
iptables -t nat -A KUBE-SEP-API -p tcp -m tcp -j DNAT --to-destination 203.0.113.50:6443
ip6tables -t nat -A KUBE-SEP-API -p tcp -m tcp -j DNAT --to-destination [2001:db8:71::50]:6443
iptables -t nat -I KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-API
ip6tables -t nat -I KUBE-SERVICES -d fd96::1/128 -p tcp -m tcp --dport 443 -j KUBE-SVC-API
"""
_KUBE_PROXY_END = f"""
{_BOTH}
    for table in nat filter; do
        $t-save -t $table | grep -e '^-A [A-Z]*ING .*KUBE' -e '^-A [A-Z]*PUT .*KUBE' | sed s/^-A/-D/ |
            while read -r rule; do eval "$t -t $table $rule"; done
        for what in F X; do
            for c in $($t-save -t $table | sed -n 's/^:\\(KUBE-[^ ]*\\) .*/\\1/p'); do $t -t $table -$what $c; done
        done
    done
done
"""
KUBE_PROXY = Neighbour(
    "kube-proxy", "kube-proxy",
    start=_KUBE_PROXY,
    restart=_KUBE_PROXY_END + _KUBE_PROXY,
)  # fmt: skip

_CALICO = f"""
{_BOTH}
    for c in cali-INPUT cali-OUTPUT cali-fh-eth0 cali-failsafe-in cali-pi-policy cali-from-host-endpoint; do
        $t -N $c
    done
    for c in cali-PREROUTING cali-OUTPUT cali-fip-dnat; do $t -t nat -N $c; done
    $t -t nat -A cali-PREROUTING -j cali-fip-dnat; $t -t nat -A cali-OUTPUT -j cali-fip-dnat
    test $t = iptables || $t -A cali-INPUT -p ipv6-icmp -j ACCEPT
    $t -A cali-INPUT -i cali+ -j ACCEPT; $t -A cali-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
    $t -A cali-INPUT -j MARK --set-xmark 0x0/0xf0000; $t -A cali-INPUT -j cali-from-host-endpoint
    $t -A cali-INPUT -m comment --comment "Host endpoint policy accepted packet." \\
        -m mark --mark 0x10000/0x10000 -j ACCEPT
    $t -A cali-from-host-endpoint -i eth0 -g cali-fh-eth0
    $t -A cali-fh-eth0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    $t -A cali-fh-eth0 -m conntrack --ctstate INVALID -j DROP
    $t -A cali-fh-eth0 -j cali-failsafe-in; $t -A cali-fh-eth0 -j MARK --set-xmark 0x0/0x10000
    $t -A cali-fh-eth0 -j cali-pi-policy; $t -A cali-fh-eth0 -m mark --mark 0x10000/0x10000 -j RETURN
    $t -A cali-fh-eth0 -m comment --comment "Drop if no profiles matched" -j DROP
    $t -A cali-failsafe-in -p tcp -m tcp --dport 22 -j ACCEPT
    $t -A cali-pi-policy -p tcp -m tcp --dport 8080 -j MARK --set-xmark 0x10000/0x10000
    $t -A cali-pi-policy -m mark --mark 0x10000/0x10000 -j RETURN
    $t -I INPUT -j cali-INPUT; $t -I OUTPUT -j cali-OUTPUT
    $t -t nat -I PREROUTING -j cali-PREROUTING; $t -t nat -I OUTPUT -j cali-OUTPUT
done
"""
CALICO = Neighbour(
    "calico", "calico",
    start=_CALICO,
    # felix inserts its jumps anew, at the top, when they have gone from there
    restart=f"""{_BOTH}
        $t -D INPUT -j cali-INPUT; $t -I INPUT -j cali-INPUT
        $t -t nat -D PREROUTING -j cali-PREROUTING; $t -t nat -I PREROUTING -j cali-PREROUTING
        $t -t nat -D OUTPUT -j cali-OUTPUT; $t -t nat -I OUTPUT -j cali-OUTPUT
    done""",
)  # fmt: skip

_CROWDSEC = """
printf '%s\\n' '
table ip crowdsec { set crowdsec-blacklists { type ipv4_addr; flags timeout; elements = { 203.0.113.9 timeout 1h }; }
  chain crowdsec-chain { type filter hook input priority filter - 10; ip saddr @crowdsec-blacklists drop; }; }
table ip6 crowdsec6 { set crowdsec6-blacklists { type ipv6_addr; flags timeout; elements = { 2001:db8:71::9 }; }
  chain crowdsec6-chain { type filter hook input priority filter - 10; ip6 saddr @crowdsec6-blacklists drop; }; }
' | nft -f -
"""
CROWDSEC = Neighbour(
    "crowdsec", "CrowdSec",
    start=_CROWDSEC,
    restart=f"nft delete table ip crowdsec; nft delete table ip6 crowdsec6; {_CROWDSEC}",
)  # fmt: skip

_NFTABLES_CONF = """
cat >/etc/nftables.conf <<'END'
flush ruleset
table inet filter {
  chain input { type filter hook input priority filter; policy drop
    ct state established,related accept
    iifname "lo" accept
    meta l4proto { icmp, ipv6-icmp } accept
    tcp dport { 22, 8080 } accept
  }
  chain output { type filter hook output priority filter; policy accept; }
}
END
nft -f /etc/nftables.conf
"""
NFTABLES_CONF = Neighbour(
    "nftables.conf", "an administrator",
    start=_NFTABLES_CONF,
    restart="nft -f /etc/nftables.conf",
    variants=("nft",),
)  # fmt: skip

_IPTABLES_RULES = f"""
cat >/run/rules <<'END'
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p ipv6-icmp -j ACCEPT
-A INPUT -p tcp -m multiport --dports 22,8080 -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -o ppp0 -j MASQUERADE
COMMIT
END
{_BOTH} $t-restore </run/rules; done
"""
IPTABLES_PERSISTENT = Neighbour(
    "iptables-restore", "an administrator",
    start=_IPTABLES_RULES,
    restart=f"{_BOTH} $t-restore </run/rules; done",
)  # fmt: skip

WRITTEN = (TAILSCALE, KUBE_PROXY, CALICO, CROWDSEC, NFTABLES_CONF, IPTABLES_PERSISTENT)

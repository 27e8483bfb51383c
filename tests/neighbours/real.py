"""Neighbours that are the real software of the distribution."""

from __future__ import annotations

from tests.neighbours.catalogue import PUBLISHED, Neighbour, Outgoing
from tests.neighbours.room import GROUP

_UFW = (
    Neighbour(
        "ufw", "ufw",
        needs=("ufw",),
        start="ufw allow 8080/tcp; ufw --force enable",
        restart="ufw reload",
    ),
    Neighbour(
        "ufw-outgoing", "ufw",
        needs=("ufw",),
        start="ufw allow 8080/tcp; ufw default deny outgoing; ufw allow out 443/tcp; ufw --force enable",
        restart="ufw disable; ufw --force enable",
    ),
)  # fmt: skip

_BEGIN_FIREWALLD = "begin firewalld firewalld --nofork --nopid; await firewall-cmd --state"
_FIREWALLD = """
sed -i 's/^FirewallBackend=.*/FirewallBackend={backend}/' /etc/firewalld/firewalld.conf
firewall-offline-cmd --zone=public --add-port=8080/tcp
begin dbus dbus-daemon --system --nofork --nopidfile; await test -S /run/dbus/system_bus_socket
"""
_RFC3964 = {
    "set RFC3964_IPv4=no in /etc/firewalld/firewalld.conf and run":
    "sed -i s/^RFC3964_IPv4=.*/RFC3964_IPv4=no/ /etc/firewalld/firewalld.conf;"
}  # fmt: skip
_FIREWALLDS = tuple(
    Neighbour(
        f"firewalld-{backend}{suffix}", "firewalld",
        needs=("firewalld", "dbus-daemon"),
        start=_FIREWALLD.format(backend=backend) + _BEGIN_FIREWALLD,
        restart=restart,
        meant=_RFC3964,
    )
    for backend in ("nftables", "iptables")
    for suffix, restart in (("", f"end firewalld; {_BEGIN_FIREWALLD}"), ("-reloaded", "firewall-cmd --reload"))
)  # fmt: skip

_BEGIN_FAIL2BAN = "begin fail2ban fail2ban-server -f --logtarget STDOUT start; await fail2ban-client ping"
_FAIL2BAN = """
mkdir -p /run/fail2ban /var/lib/fail2ban; touch /var/log/web.log
rm /etc/fail2ban/jail.d/*
cat >/etc/fail2ban/jail.d/web.conf <<END
[web]
enabled = true
filter = sshd
port = 8080
backend = polling
logpath = /var/log/web.log
banaction = {action}
END
{begin}
fail2ban-client set web banip 203.0.113.9 2001:db8:71::9
await sh -c 'fail2ban-client status web | grep 203.0.113.9.*2001:db8:71::9'
"""
_FAIL2BANS = tuple(
    Neighbour(
        f"fail2ban-{action}", "fail2ban",
        needs=("fail2ban-server",),
        start=_FAIL2BAN.format(action=action, begin=_BEGIN_FAIL2BAN),
        restart=f"end fail2ban; {_BEGIN_FAIL2BAN}; await sh -c 'fail2ban-client status web | grep 203.0.113.9'",
    )
    for action in ("iptables-multiport", "iptables-allports", "nftables-multiport")
)  # fmt: skip

_BEGIN_DOCKER = f"""
begin docker dockerd --storage-driver vfs --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent /${GROUP} {{flags}}
await docker info
"""
_DOCKER = f"""
mkdir -p /var/lib/docker /run/image; cp "$(command -v busybox)" /run/image/busybox
{_BEGIN_DOCKER}
tar -C /run/image -c . | docker import - box
docker run --detach --restart always --stop-signal KILL --publish {PUBLISHED}:80 --name web box /busybox sleep 100000
"""
_RUNNING = "await sh -c 'test $(docker inspect --format {{.State.Running}} web) = true'"
_DOCKERS = tuple(
    Neighbour(
        name, "Docker",
        needs=("dockerd", "docker", "containerd", "busybox"),
        start=_DOCKER.format(flags=flags),
        restart=f"end docker\n{_BEGIN_DOCKER.format(flags=flags)}\n{_RUNNING}",
        published=(4,),
    )
    for name, flags in (("docker", ""), ("docker-without-proxy", "--userland-proxy=false"))
)  # fmt: skip

_NETAVARK = f"""
test -e /run/netns/web || ip netns add web
cat >/run/web.json <<END
{{"container_id": "2d5e7dc8a0f1", "container_name": "web",
 "networks": {{"podman": {{"interface_name": "eth0", "static_ips": ["10.88.0.2", "fd88::2"]}}}},
 "network_info": {{"podman": {{"name": "podman", "driver": "bridge", "network_interface": "podman0",
  "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9", "created": "2022-01-01T00:00:00Z",
  "subnets": [{{"subnet": "10.88.0.0/16", "gateway": "10.88.0.1"}}, {{"subnet": "fd88::/64", "gateway": "fd88::1"}}],
  "ipv6_enabled": true, "internal": false, "dns_enabled": false, "ipam_options": {{"driver": "host-local"}}}}}},
 "port_mappings": [{{"host_ip": "", "container_port": 80, "host_port": {PUBLISHED}, "range": 1, "protocol": "tcp"}}]}}
END
/usr/lib/podman/netavark setup /run/netns/web </run/web.json
"""
_PODMAN = Neighbour(
    "podman", "podman",
    needs=("/usr/lib/podman/netavark",),
    start=_NETAVARK,
    restart=f"/usr/lib/podman/netavark teardown /run/netns/web </run/web.json; {_NETAVARK}",
    published=(4, 6),
)  # fmt: skip

_BEGIN_LIBVIRT = "begin libvirtd libvirtd; await virsh --connect qemu:///system net-list"
_LIBVIRT = f"""
mkdir -p /run/libvirt /var/lib/libvirt /var/log/libvirt
rm -f /etc/libvirt/qemu/networks/*.xml
cat >/run/network.xml <<END
<network><name>site</name><forward mode="nat"/><bridge name="virbr0"/>
<ip address="192.168.122.1" netmask="255.255.255.0"/><ip family="ipv6" address="fd22::1" prefix="64"/></network>
END
{_BEGIN_LIBVIRT}
virsh --connect qemu:///system net-define /run/network.xml
virsh --connect qemu:///system net-autostart site; virsh --connect qemu:///system net-start site
"""
_LIBVIRTD = Neighbour(
    "libvirt", "libvirt",
    needs=("libvirtd", "virsh", "dnsmasq"),
    start=_LIBVIRT,
    restart=f"end libvirtd; {_BEGIN_LIBVIRT}",
)  # fmt: skip

_WG_QUICK = """
mkdir -p /etc/wireguard; umask 077
cat >/etc/wireguard/wg0.conf <<END
[Interface]
PrivateKey = $(wg genkey)
Address = 10.66.0.2/32, fd66::2/128
[Peer]
PublicKey = $(wg genkey | wg pubkey)
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = 198.19.255.1:51820
END
"""
_WG_UP = "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go wg-quick up wg0"
_WIREGUARD = Neighbour(
    "wg-quick", "wg-quick",
    needs=("wg-quick", "wireguard-go"),
    start=_WG_QUICK + _WG_UP,
    restart=f"wg-quick down wg0; {_WG_UP}",
    is_near=True,  # its rules of ip-rule(8) send answers to everybody else into the tunnel
    outgoing=(
        Outgoing("203.0.113.8", source="10.66.0.2"),
        Outgoing("2001:db8:71::8", source="fd66::2"),
    ),
)  # fmt: skip

_TOGETHER = (_UFW[0], next(one for one in _FAIL2BANS if "nftables" in one.name), _DOCKERS[0])
_CROWD = Neighbour(
    "ufw-fail2ban-docker", "ufw",  # the only one of them that loses anything
    needs=tuple(program for one in _TOGETHER for program in one.needs),
    start="\n".join(one.start for one in _TOGETHER),
    restart="\n".join(one.restart for one in reversed(_TOGETHER)),
    published=_DOCKERS[0].published,
)  # fmt: skip

REAL = (*_UFW, *_FIREWALLDS, *_FAIL2BANS, *_DOCKERS, _PODMAN, _LIBVIRTD, _WIREGUARD, _CROWD)

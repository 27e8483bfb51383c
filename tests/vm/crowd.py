"""ufw, fail2ban and Docker together on one machine, from Debian's packages, and what runs there beside them.

The container is made of nothing but busybox, so no registry is asked.
"""

from __future__ import annotations

from tests.vm.conftest import SERVICE_PORT
from tests.vm.images import Recipe
from tests.vm.machine import Machine

PUBLISHED = 8088
"""The machine's port that Docker translates to the container's."""
PACKAGES = ("containerd", "docker.io", "fail2ban", "nftables", "python3-systemd", "ufw")
CLIENT_PACKAGE = {"trixie": ("docker-cli",)}
"""Since Debian 13, Docker's client is a package of its own."""
SERVICES = ("ufw", "fail2ban", "docker")
_SCRIPT = """
# Installed, but a scenario's own to start.
systemctl disable --quiet ufw.service fail2ban.service docker.service docker.socket containerd.service
"""
_JAILS = f"""\
[sshd]
enabled = true
backend = systemd
[web]
enabled = true
filter = sshd
port = {SERVICE_PORT}
backend = polling
logpath = /var/log/web.log
"""
_CONTAINER = f"""
mkdir -p /srv/box/bin /srv/box/www && cp /bin/busybox /srv/box/bin/ && printf "the container" >/srv/box/www/index.html
tar -C /srv/box -c . | docker import - box >/dev/null
docker run --detach --restart always --publish {PUBLISHED}:80 --name web box \\
    /bin/busybox httpd -f -p 80 -h /www >/dev/null
"""
STARTS = {
    "ufw": f"ufw allow 22/tcp && ufw allow {SERVICE_PORT}/tcp && ufw --force enable && systemctl enable --now ufw",
    "fail2ban": "touch /var/log/web.log && systemctl enable --now fail2ban "
    "&& until fail2ban-client status web && fail2ban-client status sshd; do sleep 0.5; done",
    "docker": f"systemctl enable --now docker && {_CONTAINER}",
}
"""How an administrator begins to use each."""
RESTARTS = {
    "docker": "systemctl restart docker",
    "ufw": "systemctl restart ufw",
    "fail2ban": "systemctl restart fail2ban && until fail2ban-client status web; do sleep 0.5; done",
}


def recipe(release: str) -> Recipe:
    """The image with all three installed, and none of them enabled."""
    return Recipe(release, (*PACKAGES, *CLIENT_PACKAGE.get(release, ())), _SCRIPT)


def start(machine: Machine) -> None:
    """Begin to use all three."""
    machine.write("/etc/fail2ban/jail.local", _JAILS)
    for service in SERVICES:
        machine.run(STARTS[service])

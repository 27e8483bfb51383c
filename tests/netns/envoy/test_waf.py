"""docs/kong-nginx.md: nginx with ModSecurity and its Core Rule Set, as Debian has them, between Envoy and a service."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hidden import ROOT_DIRECTORY
from tests.netns.envoy.application import answer_http, serving
from tests.netns.envoy.scene import Answer, curl, running
from tests.netns.relay import net as relay_net
from tests.netns.relay.net import HOST4, HOST6, PEER4, PEER6, Net, until

MODULE = Path("/usr/share/nginx/modules/ngx_http_modsecurity_module.so")
RULES = Path("/usr/share/modsecurity-crs/owasp-crs.load")
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        not (shutil.which("nginx") and MODULE.exists() and RULES.exists()),
        reason="needs nginx, libnginx-mod-http-modsecurity and modsecurity-crs; `make test-envoy` installs them",
    ),
]
PAGE = ROOT_DIRECTORY / "docs/kong-nginx.md"


@pytest.fixture(scope="module")
def protected() -> Iterator[Net]:
    """The files of the page, with nginx in the foreground."""
    section = PAGE.read_text(encoding="utf-8").partition("## A web application firewall")[2].partition("\n## ")[0]
    nginx, rules, envoy = re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)
    with relay_net.network() as net, relay_net.public_directory() as folder:
        (folder / "rules.conf").write_text(rules)
        server = nginx.replace("/etc/nginx/waf.rules", str(folder / "rules.conf"))
        (folder / "nginx.conf").write_text(
            f"load_module {MODULE}; daemon off; pid {folder}/pid; error_log {folder}/error.log; user root;\n"
            f"events {{}}\nhttp {{ access_log off; {server} }}\n"
        )
        argv = ["nsenter", f"--net=/run/netns/{net.host}", "nginx", "-e", "stderr", "-c", str(folder / "nginx.conf")]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(lambda: process.poll() is not None or ":8081 " in net.on_host("ss", "-Hltn"))
            assert process.poll() is None, (folder / "error.log").read_text()
            with serving(net, net.host, 8080, answer_http), running(net, folder, envoy):
                yield net
        finally:
            process.terminate()
            process.wait()


@pytest.mark.parametrize(("host", "peer"), [(HOST4, PEER4), (HOST6, PEER6)], ids=["v4", "v6"])
def test_attacks_end_at_the_firewall(protected: Net, host: str, peer: str) -> None:
    def ask(path: str, *options: str) -> Answer:
        return curl(protected, protected.peer, host, 8080, *options, "-H", "Host: shop.example", path=path)

    asked = ask("/?q=shoes").asked
    assert asked.header("x-real-ip") == [peer]
    assert asked["peer"] == "127.0.0.1"
    for path in ("/?q=<script>alert(1)</script>", "/?id=1%27%20OR%20%271%27=%271", "/?file=../../etc/passwd"):
        assert ask(path, "--globoff").status == 403, path
    assert ask("/", "-A", "sqlmap/1.7").status == 403

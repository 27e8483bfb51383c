# `make help` lists the targets. Everything runs from a fresh clone: `venv` and `dev` install what is missing.
SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
# What tpctl itself needs, and what those who work on it need in addition.
PACKAGES := python3-venv python3-nftables iptables nftables iproute2
DEV_PACKAGES := $(PACKAGES) python3-dev gcc libc6-dev python3-bpfcc conntrack bind9-dnsutils curl util-linux strace procps
VM_PACKAGES := qemu-system-x86 mmdebstrap e2fsprogs mount openssh-client
# What packages are built and checked with, and the shells that complete words.
DELIVERY_PACKAGES := dpkg rpm man-db mandoc zsh fish
# Real peers of the tests. None of them is started, nor at the next boot (.ci/packages).
TEST_PACKAGES := firewalld ufw fail2ban dbus $(DELIVERY_PACKAGES) openssl openssh-server openssh-client systemd haproxy dnsmasq-base nghttp2-server mount
# Software that keeps rules of its own, for tests/neighbours; in `make test`, what is missing is skipped.
# Docker's client is a package of its own since Debian 13.
DOCKER_PACKAGES = docker.io $(shell . /etc/os-release && [ "$$ID" = debian ] && [ "$${VERSION_ID:-13}" -ge 13 ] && echo docker-cli) containerd
NEIGHBOUR_PACKAGES = ufw firewalld dbus fail2ban $(DOCKER_PACKAGES) netavark libvirt-daemon-system libvirt-clients \
	dnsmasq-base wireguard-tools wireguard-go busybox-static iproute2
BENCH_PACKAGES := nginx-common nginx-light wrk
BENCH_DNS_PACKAGES := dnsperf dnsmasq-base unbound
BENCH_RELAY_PACKAGES := $(BENCH_PACKAGES) haproxy libnginx-mod-stream

.DEFAULT_GOAL := help
.PHONY: help system venv dev demo demo-l7 test test-all test-without check fix test-equivalence test-mutations fuzz test-crash test-envoy test-prometheus test-vm test-vm-ebpf test-userspace test-neighbours test-envoy-run vagrant-box torture soak bench-install bench-swap bench-scale bench-engines bench-relay bench-dns lock lock-check man sbom clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

system: ## install the distribution packages that are missing (Debian, Ubuntu; root)
	@.ci/packages $(PACKAGES)

venv: $(VENV)/.ready ## a working .venv/bin/tpctl on the system's Python: no compiler, nothing for tests

dev: $(VENV)/.dev ## the same with what the tests, the linter and the builds of packages need

INSTALL = test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

# --system-site-packages: bcc and libnftables' Python bindings exist only as distribution packages.
$(VENV)/.ready: pyproject.toml .ci/packages Makefile
	@.ci/packages $(PACKAGES)
	@$(INSTALL) .
	@touch $@

$(VENV)/.dev: pyproject.toml .ci/packages Makefile
	@.ci/packages $(DEV_PACKAGES)
	@$(INSTALL) '.[dev]'
	@touch $(VENV)/.ready $@

demo: venv ## the main job in throwaway network namespaces, as a table
	@$(BIN)/python -m tests.demo

demo-l7: dev ## what Envoy does with requests, for a CDN, strangers, an office and a partner, as a table (root)
	@.ci/packages openssl
	@$(BIN)/python -m tests.demo_l7

test: dev ## the tests, of long suites a slice (root: namespaces are made and removed; JOBS=1: one file at a time)
	@.ci/packages $(TEST_PACKAGES)
	@$(BIN)/python -m pytest --numprocesses $(or $(JOBS),3) --dist loadfile --no-loadscope-reorder

test-all: dev ## every test, whole suites and a virtual machine among them (root)
	@.ci/packages $(TEST_PACKAGES) $(VM_PACKAGES)
	@TPCTL_TESTS=all $(BIN)/python -m pytest --numprocesses $(or $(JOBS),3) --dist loadfile --no-loadscope-reorder

test-without: dev ## every test on a kernel that refuses something: none may fail (REFUSED="bpf legacy", root)
	@.ci/packages $(TEST_PACKAGES)
	@$(BIN)/python -m tests.without $(or $(REFUSED),bpf legacy) -- $(BIN)/python -m pytest

test-equivalence: dev ## every engine against the specification on N random policies (N=2000, root)
	@$(BIN)/python -m tests.equivalence $(or $(N),200)

test-mutations: dev ## deliberately broken engines: how many the suite catches (root)
	@$(BIN)/python -m tests.equivalence.mutate

fuzz: dev ## random input for every parser of files, variables, rules and packets (N=1000000 for each, hours)
	@$(BIN)/python -m tests.fuzz $(or $(N),1000000)

test-neighbours: dev ## beside ufw, firewalld, fail2ban, Docker, podman, libvirt, WireGuard and others, whoever comes first (root)
	@.ci/packages $(NEIGHBOUR_PACKAGES)
	@TPCTL_TESTS=all $(BIN)/python -m pytest $(if $(JOBS),--numprocesses $(JOBS)) tests/neighbours

test-envoy-run: dev ## every secret of `tpctl envoy run` replaced in every way, and 20 policies, while clients ask (root)
	@.ci/packages $(TEST_PACKAGES)
	@TPCTL_TESTS=all $(BIN)/python -m pytest $(if $(JOBS),--numprocesses $(JOBS)) tests/netns/envoy_process

test-prometheus: dev ## metrics, alert rules and dashboard against Prometheus' own promtool (96 MB installed)
	@.ci/packages prometheus
	@$(BIN)/python -m pytest tests/unit/cli/printing/test_textfile.py tests/netns/test_json.py

test-crash: dev ## killed and failing at every system call that changes anything, and 50 commands at once (STEP=5: every fifth)
	@.ci/packages $(TEST_PACKAGES)
	@$(BIN)/python -m tests.crash --step $(or $(STEP),1)
	@$(BIN)/python -m tests.crash --failing --step $(or $(STEP),1)
	@$(BIN)/python -m tests.crash --rollback --turns --step $(or $(STEP),1)
	@$(BIN)/python -m tests.crash --hanging
	@$(BIN)/python -m tests.crash --at-once 50

test-envoy: dev ## Envoy as tpctl configures it: a thousand random files, and real clients and attackers (root)
	@.ci/packages $(TEST_PACKAGES) nginx-common nginx-light libnginx-mod-stream libnginx-mod-http-modsecurity modsecurity-crs python3-grpcio
	@TPCTL_TESTS=all $(BIN)/python -m pytest tests/unit/envoy tests/netns/envoy

test-vm: dev ## reboots, firewalld, ssh and data planes in virtual machines of Debian 11, 12 and 13 (VM_RELEASES=...)
	@.ci/packages $(VM_PACKAGES)
	@VM_RELEASES="$(or $(VM_RELEASES),bullseye bookworm trixie)" $(BIN)/python -m pytest --verbose --durations=0 tests/vm

test-vm-ebpf: dev ## the eBPF engine against the specification under Linux 5.10, 6.1 and 6.12, in virtual machines (N=12)
	@.ci/packages qemu-system-x86
	@$(BIN)/python -m tests.vm.ebpf --policies $(or $(N),12)

test-userspace: dev ## every engine with the programs and libraries of Debian 12, 13 and unstable, in chroots (N=20, RELEASES=...)
	@.ci/packages mmdebstrap mount
	@$(BIN)/python -m tests.userspace --policies $(or $(N),20) $(if $(DOCUMENT),--document $(DOCUMENT)) $(RELEASES)

test-packages: dev ## the packages and the wheel in bare chroots of Debian 12 and 13, the image by podman (root)
	@.ci/packages mmdebstrap mount buildah podman crun $(DELIVERY_PACKAGES)
	@PACKAGES=all $(BIN)/python -m pytest --verbose tests/delivery

test-pages: dev ## every command of README and docs/ that is run as printed: it must print what is there (root; WRITE=1: write it anew)
	@.ci/packages $(TEST_PACKAGES) nginx-light
	@$(if $(WRITE),$(BIN)/python -m tests.pages,TPCTL_TESTS=all $(BIN)/python -m pytest tests/pages)

vagrant-box: dev ## a box of Debian 12 for vagrant-libvirt, see docs/vagrant.md (VM_RELEASES=...)
	@.ci/packages qemu-utils mmdebstrap e2fsprogs grub-pc-bin
	@$(BIN)/python -m tests.vm.box $(VM_RELEASES)

torture: dev ## a thousand connections at once on each path of the relay's pump, three times (N=1000, root)
	@TORTURE_CONNECTIONS=$(or $(N),1000) $(BIN)/python -m pytest -s tests/torture

soak: dev ## traffic, swaps, restarts, drift and repair, and whether anything grows (MINUTES=20, root)
	@.ci/packages $(TEST_PACKAGES)
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),20)

check: dev ## lint with security rules, strict types, and every dependency pinned
	$(BIN)/ruff check agent tests .ci
	$(BIN)/ruff format --check agent tests .ci
	$(BIN)/mypy
	$(BIN)/python .ci/lock.py --check

fix: dev ## let the linter fix what it can
	$(BIN)/ruff check --fix agent tests .ci
	$(BIN)/ruff format agent tests .ci

bench-install: dev ## install against bare iptables-restore, and start-up time
	@$(BIN)/python -m tests.bench.install

bench-swap: dev ## connections that leak or fail while policies and engines are swapped (two minutes)
	@$(BIN)/python -m tests.bench.swap

bench-scale: dev ## thousands of exclusions beside none, on each engine: install and new connections a second
	@$(BIN)/python -m tests.bench.scale
	@$(BIN)/python -m tests.bench.many
	@$(BIN)/python -m tests.bench.crowded

bench-engines: dev ## each engine through the same Envoy and the same relay, in N rounds of a minute (N=5)
	@.ci/packages $(BENCH_PACKAGES)
	@$(BIN)/python -m tests.bench.engines $(if $(N),--rounds $(N))

bench-relay: dev ## the relay beside HAProxy, Envoy, nginx and no proxy: rates, latency, CPU time, memory (six minutes)
	@.ci/packages $(BENCH_RELAY_PACKAGES)
	@$(BIN)/python -m tests.bench.relay $(if $(N),--rounds $(N)) --picture docs/relay-bench.svg

bench-dns: dev ## the relay's DNS beside dnsmasq, unbound and, where it is installed, CoreDNS (two minutes)
	@.ci/packages $(BENCH_DNS_PACKAGES)
	@$(BIN)/python -m tests.bench.dns $(if $(N),--rounds $(N))

lock: dev ## pin what a release needs, with hashes, in .ci/requirements.txt
	$(BIN)/python .ci/lock.py

lock-check: dev ## whether everything that pyproject.toml asks for is pinned there
	$(BIN)/python .ci/lock.py --check

.PHONY: man docs deb rpm oci release test-packages test-pages

man: venv ## dist/man: a man page of every command, from its help
	@PYTHONPATH=.ci $(BIN)/python -m delivery.man

deb: venv ## dist/tpctl_VERSION_all.deb: for Debian 12 and later, the same bytes each time
	@.ci/packages dpkg
	@PYTHONPATH=.ci $(BIN)/python -m delivery.deb

rpm: venv ## dist/tpctl-VERSION-1.noarch.rpm: for RHEL 9, with a virtual environment of its own
	@.ci/packages rpm
	@PYTHONPATH=.ci $(BIN)/python -m delivery.rpm

oci: venv ## dist/tpctl-VERSION.oci.tar: an image of Debian 12 with what tpctl needs (root)
	@.ci/packages dpkg mmdebstrap mount buildah
	@PYTHONPATH=.ci $(BIN)/python -m delivery.oci

release: dev ## dist/VERSION: wheel, sdist, packages, SBOM, checksums, changes, from the tag (REHEARSE=1: without one)
	@.ci/packages dpkg rpm
	@PYTHONPATH=.ci $(BIN)/python -m delivery.release $(if $(REHEARSE),--rehearse)

docs: venv ## dist/site: the documentation as a site, with every link checked
	@$(INSTALL) '.[docs]'
	@rm -rf dist/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file .ci/mkdocs.yml

sbom: dev ## dist/tpctl.cdx.json: what an installed tpctl is made of, as CycloneDX
	@$(BIN)/python .ci/sbom.py

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# `make help` lists the targets. Everything runs from a fresh clone: `venv` installs what is missing.
SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := python3-venv python3-dev gcc libc6-dev python3-bpfcc python3-nftables iptables nftables iproute2 conntrack \
	dnsutils curl util-linux strace procps
VM_PACKAGES := qemu-system-x86 mmdebstrap e2fsprogs mount openssh-client
# Real peers of the tests. None of them is started, nor at the next boot (.ci/packages).
TEST_PACKAGES := firewalld dbus openssh-server openssh-client systemd haproxy dnsmasq-base $(VM_PACKAGES)
BENCH_PACKAGES := nginx-common nginx-light wrk
BENCH_RELAY_PACKAGES := $(BENCH_PACKAGES) haproxy libnginx-mod-stream

.DEFAULT_GOAL := help
.PHONY: help system venv demo test check fix test-equivalence test-mutations fuzz test-crash test-vm test-vm-ebpf vagrant-box torture soak bench-install bench-swap bench-scale bench-engines bench-relay lock lock-check sbom clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

system: ## install the distribution packages that are missing (Debian, Ubuntu; root)
	@.ci/packages $(PACKAGES)

venv: $(VENV)/.ready ## a working .venv/bin/tpctl on the system's Python

$(VENV)/.ready: pyproject.toml .ci/packages Makefile
	@.ci/packages $(PACKAGES)
	@# --system-site-packages: bcc and libnftables' Python bindings exist only as distribution packages.
	test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv ## the main job in throwaway network namespaces, as a table
	@$(BIN)/python -m tests.demo

test: venv ## every test (root: namespaces are made and removed)
	@.ci/packages $(TEST_PACKAGES)
	@$(BIN)/python -m pytest

test-equivalence: venv ## every engine against the specification on N random policies (N=2000, root)
	@$(BIN)/python -m tests.equivalence $(or $(N),200)

test-mutations: venv ## deliberately broken engines: how many of them the suite finds out (root)
	@$(BIN)/python -m tests.equivalence.mutate

fuzz: venv ## random input for every parser of files, variables, rules and packets (N=1000000 for each, hours)
	@$(BIN)/python -m tests.fuzz $(or $(N),1000000)

test-crash: venv ## killed and failing at every system call that changes anything, and 50 commands at once (STEP=5: each fifth)
	@.ci/packages $(TEST_PACKAGES)
	@$(BIN)/python -m tests.crash --step $(or $(STEP),1)
	@$(BIN)/python -m tests.crash --failing --step $(or $(STEP),1)
	@$(BIN)/python -m tests.crash --rollback --turns --step $(or $(STEP),1)
	@$(BIN)/python -m tests.crash --hanging
	@$(BIN)/python -m tests.crash --at-once 50

test-vm: venv ## reboots, firewalld, ssh and data planes in virtual machines of Debian 11, 12 and 13 (VM_RELEASES=...)
	@.ci/packages $(VM_PACKAGES)
	@VM_RELEASES="$(or $(VM_RELEASES),bullseye bookworm trixie)" $(BIN)/python -m pytest --verbose --durations=0 tests/vm

test-vm-ebpf: venv ## the eBPF engine against the specification under Linux 5.10, 6.1 and 6.12, in virtual machines (N=12)
	@.ci/packages qemu-system-x86
	@$(BIN)/python -m tests.vm.ebpf --policies $(or $(N),12)

vagrant-box: venv ## a box of Debian 12 for vagrant-libvirt, see docs/vagrant.md (VM_RELEASES=...)
	@.ci/packages qemu-utils mmdebstrap e2fsprogs grub-pc-bin python3-wheel
	@$(BIN)/python -m tests.vm.box $(VM_RELEASES)

torture: venv ## a thousand connections at once on each path of the relay's pump, three times (N=1000, root)
	@TORTURE_CONNECTIONS=$(or $(N),1000) $(BIN)/python -m pytest -s tests/torture

soak: venv ## traffic, swaps, restarts, drift and repair, and whether anything grows (MINUTES=20, root)
	@.ci/packages $(TEST_PACKAGES)
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),20)

check: venv ## lint with security rules, strict types, and every dependency pinned
	$(BIN)/ruff check agent tests .ci
	$(BIN)/ruff format --check agent tests .ci
	$(BIN)/mypy
	$(BIN)/python .ci/lock.py --check

fix: venv ## let the linter mend what it can
	$(BIN)/ruff check --fix agent tests
	$(BIN)/ruff format agent tests

bench-install: venv ## install against bare iptables-restore, and start-up time
	@$(BIN)/python -m tests.bench.install

bench-swap: venv ## connections that leak or fail while policies and engines are swapped (two minutes)
	@$(BIN)/python -m tests.bench.swap

bench-scale: venv ## thousands of exclusions beside none, on each engine: install and new connections a second
	@$(BIN)/python -m tests.bench.scale

bench-engines: venv ## each engine through the same Envoy and the same relay, in N rounds of a minute (N=5)
	@.ci/packages $(BENCH_PACKAGES)
	@$(BIN)/python -m tests.bench.engines $(if $(N),--rounds $(N))

bench-relay: venv ## the relay beside HAProxy, Envoy, nginx and no proxy: rates, latency, CPU time, memory (six minutes)
	@.ci/packages $(BENCH_RELAY_PACKAGES)
	@$(BIN)/python -m tests.bench.relay $(if $(N),--rounds $(N)) --picture docs/relay-bench.svg

lock: venv ## pin what a release needs, with hashes, in .ci/requirements.txt
	$(BIN)/python .ci/lock.py

lock-check: venv ## whether everything that pyproject.toml asks for is pinned there
	$(BIN)/python .ci/lock.py --check

sbom: venv ## dist/tpctl.cdx.json: what an installed tpctl is made of, as CycloneDX
	@$(BIN)/python .ci/sbom.py

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

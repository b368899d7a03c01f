# Everything by name: make help

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

.DEFAULT_GOAL := help
.PHONY: help demo test test-long kernel-test bench bench-jobs build install lint doc setup clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: ## the main job on a real kernel: serve a chain, mkfs, dd, live snapshot, check
	@kernel-tests/setup build vm
	$(CARGO) build --release --bins
	@kernel-tests/vm kernel-tests/demo.sh

test: ## all tests: lint, without ublk, and against two kernels with it
	@kernel-tests/test-all

test-long: ## all tests, with many more loops and cases
	@kernel-tests/test-all --long

kernel-test: ## only the tests against the ublk driver, on the new kernel
	@kernel-tests/setup build vm
	$(CARGO) build --release --bins
	@kernel-tests/vm kernel-tests/[0-9][0-9]-*.sh

bench: ## measure against rublk and qemu-storage-daemon, as a table
	@kernel-tests/setup build vm
	$(CARGO) build --release --bins
	@benches/peers

bench-jobs: ## measure jobs against qemu-storage-daemon, as a table
	@kernel-tests/setup build
	$(CARGO) build --release --bins
	@benches/jobs

build: ## the two binaries, optimised
	@kernel-tests/setup build
	$(CARGO) build --release --bins

lint: ## format and clippy
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --all-features -- -D warnings

doc: ## the library's documentation
	$(CARGO) doc --no-deps --all-features

setup: ## install what all of this needs (Debian packages, kernels, Python tools)
	@kernel-tests/setup

install: build ## binaries, manual pages, systemd unit and udev rule under PREFIX
	install -D -m 755 $(TARGET_DIR)/release/liveblkd $(DESTDIR)$(PREFIX)/bin/liveblkd
	install -D -m 755 $(TARGET_DIR)/release/liveblk $(DESTDIR)$(PREFIX)/bin/liveblk
	@set -e; for unit in $(wildcard systemd/*.service); do \
	    install -D -m 644 -v $$unit $(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit##*/}; \
	    sed -i 's|/usr/local/bin|$(PREFIX)/bin|' $(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit##*/}; done
	@set -e; for rule in $(wildcard udev/*.rules); do \
	    install -D -m 644 -v $$rule $(DESTDIR)$(PREFIX)/lib/udev/rules.d/$${rule##*/}; \
	    sed -i 's|/usr/local/bin|$(PREFIX)/bin|' $(DESTDIR)$(PREFIX)/lib/udev/rules.d/$${rule##*/}; done
	install -D -m 644 systemd/modules-load.d/liveblk.conf $(DESTDIR)$(PREFIX)/lib/modules-load.d/liveblk.conf
	@set -e; for page in $(wildcard docs/man/*.1); do \
	    install -D -m 644 -v $$page $(DESTDIR)$(PREFIX)/share/man/man1/$${page##*/}; done

clean: ## build results; kernels and tools in the cache stay
	$(CARGO) clean

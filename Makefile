# Each target does all its set-up: on a Debian with Rust, `make lab` is the first thing one needs to type.
#
#   make lab     build kersey and try it out: a cluster in network namespaces, traffic, a report, nothing left behind
#   make test    all tests, those in network namespaces included
#   make check   format, lints, documentation, licences of dependencies
#   make bench   micro-benchmarks, then kersey measured against the kernel's VXLAN
#   make fuzz    each fuzz target for FUZZ_SECONDS (20)
#   make soak    faults at length; SOAK_CASES (20000) mutated VXLAN datagrams to Kersey and to a kernel, and what both let through
#                compared; the long forms of the model, of races and of many nodes; the faults again with daemons that have
#                nothing but CAP_NET_ADMIN, and with authentication on in etcd; optimised, as the `soak` profile in Cargo.toml
#                says; see CONTRIBUTING.md
#   make cross   whether it compiles for arm64, armv7 and musl (needs rustup)
#   make deps    only install what is missing
#
# ARGS is handed on: `make lab ARGS='--nodes 5 --store etcd'`, `make bench ARGS=--quick`, `make test ARGS=longest_prefix`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := lab

ARGS ?=
FUZZ_SECONDS ?= 20
SOAK_CASES ?= 20000
CROSS ?= aarch64-unknown-linux-gnu armv7-unknown-linux-gnueabihf x86_64-unknown-linux-musl
# The tests that KERSEY_SOAK makes longer.
SOAKED := --test embedded --test etcd --test etcd_many --test http --test model
# The tests that KERSEY_TEST_ETCD_AUTH has log in, but for those in namespaces.
LOGGED_IN := --test etcd --test etcd_faults --test etcd_many
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Where rustup puts cargo, in case the login shell does not know yet. Cargo and compiler stay those of the user.
export PATH := $(PATH):$(if $(CARGO_HOME),$(CARGO_HOME),$(HOME)/.cargo)/bin

# Making network namespaces takes root. Only the programs that make them get it: what cargo builds stays the user's.
ifeq ($(shell id -u),0)
AS_ROOT :=
RUNNER :=
else
AS_ROOT := sudo -E
RUNNER := --config "target.'cfg(unix)'.runner=['sudo','-E']"
endif

.PHONY: lab test check bench fuzz soak cross deps build-deps build

lab: build
	$(AS_ROOT) $(TARGET)/release/kersey lab $(ARGS)

test: deps
	@if [ -n "$(AS_ROOT)" ]; then echo 'the tests make network namespaces; sudo may ask for your password'; sudo -v; fi
	if cargo nextest --version >/dev/null 2>&1; then \
	    cargo nextest run --locked $(RUNNER) $(ARGS); \
	else \
	    cargo test --locked $(RUNNER) $(ARGS); \
	fi

check: deps
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --locked
	.ci/licences.py

bench: build
	cargo bench --locked
	mkdir -p $(TARGET)/bench
	$(AS_ROOT) $(TARGET)/release/kersey bench vs-kernel --offloads on,off --underlay-offloads on,off --loss-free --json $(TARGET)/bench/vs-kernel.json $(ARGS)

fuzz: build-deps
	@if ! cargo fuzz --version >/dev/null 2>&1; then \
	    echo 'cargo-fuzz is missing: rustup toolchain install nightly && cargo install cargo-fuzz' >&2; \
	    exit 1; \
	fi
	for target in $$(cargo +nightly fuzz list); do \
	    cargo +nightly fuzz run "$$target" -- -max_total_time=$(FUZZ_SECONDS); \
	done

soak: deps
	@if [ -n "$(AS_ROOT)" ]; then echo 'the soak makes network namespaces; sudo may ask for your password'; sudo -v; fi
	export CI=true KERSEY_SOAK_CASES=$(SOAK_CASES); \
	if cargo nextest --version >/dev/null 2>&1; then \
	    cargo nextest run --locked --cargo-profile soak $(RUNNER) --test netns_faults --test netns_interop --run-ignored only --retries 0 --no-capture --no-tests pass $(ARGS); \
	    KERSEY_SOAK=1 cargo nextest run --locked --cargo-profile soak $(RUNNER) $(SOAKED) --no-tests pass $(ARGS); \
	    KERSEY_TEST_UNPRIVILEGED=1 cargo nextest run --locked --cargo-profile soak $(RUNNER) --test netns_faults --no-tests pass $(ARGS); \
	    KERSEY_TEST_ETCD_AUTH=1 cargo nextest run --locked --cargo-profile soak $(RUNNER) $(LOGGED_IN) --no-tests pass $(ARGS); \
	else \
	    cargo test --locked --profile soak $(RUNNER) --test netns_faults --test netns_interop -- --ignored --nocapture --test-threads=1 $(ARGS); \
	    KERSEY_SOAK=1 cargo test --locked --profile soak $(RUNNER) $(SOAKED) -- $(ARGS); \
	    KERSEY_TEST_UNPRIVILEGED=1 cargo test --locked --profile soak $(RUNNER) --test netns_faults -- --test-threads=1 $(ARGS); \
	    KERSEY_TEST_ETCD_AUTH=1 cargo test --locked --profile soak $(RUNNER) $(LOGGED_IN) -- --test-threads=1 $(ARGS); \
	fi

cross:
	@.ci/deps build cross
	for target in $(CROSS); do \
	    rustup target add "$$target"; \
	    cargo check --locked --lib --bins --target "$$target"; \
	done

build: build-deps
	cargo build --release --locked

build-deps:
	@.ci/deps build

deps:
	@.ci/deps build test

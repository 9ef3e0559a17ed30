# `make demo` and `make test` do everything on a fresh Debian 12 as root; `make` lists the rest.

export CARGO_TERM_COLOR ?= auto
cargo := cargo
host := cd dev/host && CARGO_TARGET_DIR=$(CURDIR)/target/host $(cargo)
release := target/release/ovum
agent := target/agent/ovum-agent
kernel := target/kernel/vmlinux

.PHONY: help demo test check build kernel agent server bench fuzz deps tools clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 10

demo: build ## boot an image pulled from a registry; show output, exit code and boot timeline
	images=$$(dev/test-images) && dev/in-host -- dev/demo "$$images"

test: check build ## everything: checks, unit tests, end-to-end suites in the emulated host
	$(cargo) test --workspace --quiet
	$(host) test --quiet
	dev/end-to-end

check: deps tools ## format, lints, house rules, licences, documentation
	$(cargo) fmt --all --check
	$(host) fmt --check
	$(host) clippy --all-targets -- -D warnings
	$(cargo) clippy --workspace --all-targets -- -D warnings
	$(cargo) clippy --test e2e --bench boot --bench api --bench devices --bench records -- -D warnings
	$(cargo) test --quiet --test tidy
	dev/cargo-deny check --hide-inclusion-graph bans licenses sources
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" $(cargo) doc --workspace --no-deps --document-private-items --quiet

build: deps kernel agent server ## target/release/ovum, target/agent/ovum-agent, target/kernel

kernel: deps ## the guest kernel; minutes at first, nothing after
	kernel-config/build
	kernel-config/headers

agent: deps ## the guest agent
	guest-agent/build

server: deps ## server, worker and command line in one binary
	$(cargo) build --release --bin ovum

bench: build ## boots, commands, copies and lists: what they take, beside their peers
	dev/bench

fuzz: deps ## what reads bytes that an enemy chose, each target for FUZZ_SECONDS (60)
	dev/fuzz

deps: ## what is missing of Debian's packages
	dev/deps

tools: deps ## what is missing of cargo's tools
	dev/cargo-deny --version

clean: ## everything built; caches outside the checkout stay
	rm -rf target

# Each target is one line. The workspace is built whole: cargo then compiles every shared crate once, for all targets.
TARGET := $(or $(CARGO_TARGET_DIR),target)
DEVSTACK = cargo build --workspace --bins && $(TARGET)/debug/devstack
RETAIL = devstack/data/retail
THROUGH ?= cart
CONCURRENCY ?= 1

.PHONY: help demo up test replay certs build check fmt doc migrate
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## walk a purchase through real services and check every step
	@$(DEVSTACK) demo --no-build

up: ## run everything on the contract's ports until Ctrl-C
	@$(DEVSTACK) up --no-build

test: ## all the tests, on an embedded PostgreSQL and broker
	$(DEVSTACK) pg -- cargo test --workspace

replay: ## ten days of a real shop: make replay THROUGH=cart|loms CONCURRENCY=1
	@$(DEVSTACK) replay --no-build $(RETAIL) --through $(THROUGH) --concurrency $(CONCURRENCY)

certs: ## development certificates in certs/
	@$(DEVSTACK) certs

build: ## build everything
	cargo build --workspace --all-targets

check: ## format and clippy, as CI has them
	cargo fmt --all --check && cargo clippy --workspace --all-targets -- -D warnings

fmt: ## format everything
	cargo fmt --all

doc: ## the documentation of the crates, without their dependencies
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

migrate: ## bring the databases up to date: <service>/config.yaml, else CH_, LOMS_ and NOTIF_POSTGRES_URL
	@cargo build --workspace --bins && for s in checkout loms notifications; do c=$$s/config.yaml; test -f $$c || c=$$s/config.example.yaml; $(TARGET)/debug/$$s migrate --config $$c || exit; done

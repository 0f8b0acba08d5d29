# Each target is one line. The workspace is built whole: cargo then compiles every shared crate once, for all targets.
TARGET := $(or $(CARGO_TARGET_DIR),target)
DEVSTACK = cargo build --workspace --bins && $(TARGET)/debug/devstack
RETAIL = devstack/data/retail
THROUGH ?= cart
CONCURRENCY ?= 1
SECONDS ?= 120

# processes that abort, freeze or panic at named points; the feature that names them is in no other build. Without devstack, whose tests
# build the services anew, as everybody else has them
CRASHES = cargo test -p checkout -p loms -p notifications --features checkout/failpoints,loms/failpoints,notifications/failpoints --test it -- aborted frozen panics

COMPOSE = COMPOSE_IGNORE_ORPHANS=true docker compose --env-file deployments/.env
# containers read what is mounted as users of their own; a clone made under umask 077 would keep it from them
MOUNTED = $(wildcard */config.example.yaml deployments/*/)
READABLE = chmod -R a+rX $(MOUNTED)
SERVICES = -f deployments/docker-compose.yaml
LOGS = -f deployments/docker-compose.logs.yaml
# ends with the one-shot's exit code, which up --detach does not wait for; its own tries are bounded
INPUTS_MADE = test "$$(docker wait $$($(COMPOSE) $(LOGS) ps --all --quiet graylog-inputs))" = 0

.PHONY: help demo up test replay chaos attacks bench certs build check fmt doc migrate migration run-log-env run-services stop advisories
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## walk a purchase through real services and check every step
	@$(DEVSTACK) demo --no-build

up: ## run everything on the contract's ports until Ctrl-C
	@$(DEVSTACK) up --no-build

test: ## all the tests, on an embedded PostgreSQL and broker
	$(DEVSTACK) pg -- cargo test --workspace && $(TARGET)/debug/devstack pg -- $(CRASHES)

replay: ## ten days of a real shop: make replay THROUGH=cart|loms CONCURRENCY=1
	@$(DEVSTACK) replay --no-build $(RETAIL) --through $(THROUGH) --concurrency $(CONCURRENCY)

chaos: ## load while services are killed, Kafka goes away, PostgreSQL restarts; then a recount: make chaos SECONDS=120
	@$(DEVSTACK) chaos --no-build --seconds $(SECONDS)

attacks: ## the attacks of the tests, large, on a release build with 256 MiB and a core
	.ci/attacks

bench: ## how fast it is: the standard loads on a release build, written to docs/benchmarks.md
	cargo build --release --workspace --bins && $(TARGET)/release/devstack bench --no-build

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

migration: ## start the next migration: make migration service=loms name=add_order_index
	@.ci/migration "$(service)" "$(name)"

# once: it holds the passwords that the volumes were made with, so a lost one is not made anew beside them
VOLUMES = docker volume ls --quiet --filter label=com.docker.compose.project=marketplace
LOST = "deployments/.env is lost and volumes made with its passwords are there: put it back, or give up all their data first: make stop; docker volume rm \$$($(VOLUMES))"
deployments/.env:
	@volumes=$$($(VOLUMES)) && { test -z "$$volumes" || { echo $(LOST) >&2; exit 1; }; } && umask 077 && deployments/new-env >$@.part && mv $@.part $@ && echo "wrote $@, with random passwords"

run-log-env: deployments/.env ## docker compose: Graylog, Jaeger, Prometheus, Grafana
	$(READABLE); $(COMPOSE) $(LOGS) up --detach && { $(INPUTS_MADE) || { $(COMPOSE) $(LOGS) logs --tail 5 graylog-inputs; exit 1; }; }

run-services: deployments/.env ## docker compose: the services, their databases, Kafka, the ProductService stand-in
	$(READABLE); $(COMPOSE) $(SERVICES) up --detach --build --wait && $(COMPOSE) $(SERVICES) cp certs:/app/owners/operator/ca.pem certs/compose-ca.pem

stop: ## docker compose: stop all of it; the volumes stay
	docker compose -p marketplace down

advisories: ## what RustSec knows about the dependencies; needs a network
	.ci/deny check advisories

# Godwit. `make` lists what there is; every target does everything it needs by itself.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.NOTPARALLEL:

# The distribution's own interpreter first: it is where every node of a cluster looks.
PYTHON ?= $(shell for p in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
SOURCES := $(wildcard src tests bench examples tools)
EVERYDAY := $(wildcard tests/unit tests/property tests/kernel tests/journey)

# command=package, or /path=package
BASE_NEEDS := /usr/bin/python3=python3 ip=iproute2 unshare=util-linux ps=procps
TEST_NEEDS := $(BASE_NEEDS) gcc=gcc /usr/include/stdio.h=libc6-dev redis-server=redis-server go=golang-go \
	node=nodejs javac=default-jdk-headless sqlite3=sqlite3 tmux=tmux nft=nftables sshd=openssh-server \
	ssh=openssh-client curl=curl

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.PHONY: demo
demo: root-demo run-venv ## See a running program fly between three machines made on this one
	@$(BIN)/godwit demo

.PHONY: test
test: root-test deps check ## Check the code, then run the everyday tests
	@$(PYTEST) -m "not slow" $(EVERYDAY)

.PHONY: test-slow
test-slow: root-test-slow deps venv ## Run the long tests: real programs, ten flights each
	@$(PYTEST) -m slow --timeout=1800 $(EVERYDAY)

.PHONY: check
check: venv ## Format, lint, types, layers
	@$(BIN)/ruff format --check --quiet $(SOURCES) || { echo 'ruff format: run `make format`' >&2; exit 1; }
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/pyright --level error
	@$(PYTEST) -qq tests/unit/test_layers.py

.PHONY: format
format: venv ## Lay the code out as `make check` wants it
	@$(BIN)/ruff format --quiet $(SOURCES)
	@$(BIN)/ruff check --quiet --fix $(SOURCES)

.PHONY: bench
bench: root-bench deps venv ## Measure, and write docs/benchmarks.md; BENCH=--quick for a first look
	@$(BIN)/python -m bench $(BENCH)

.PHONY: venv
venv: .venv/ready-dev ## Make .venv with everything a developer needs

.PHONY: run-venv
run-venv: .venv/ready-run

.PHONY: deps
deps: ## Install the Debian packages the tests need, those that are missing
	@tools/need "make deps" $(TEST_NEEDS)

.PHONY: clean
clean: ## Remove everything made here
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests bench examples -name __pycache__ -prune -exec rm -rf {} +

# Whoever has the developer's environment has the runner's as well.
.venv/ready-run: pyproject.toml src/godwit/__init__.py
	@if [ -e .venv/ready-dev ]; then \
		$(MAKE) venv; \
	else \
		tools/make-venv "$(PYTHON)" workloads; \
	fi
	@touch $@

.venv/ready-dev: pyproject.toml src/godwit/__init__.py
	@tools/make-venv "$(PYTHON)" dev,workloads
	@touch $@

.PHONY: root-demo root-test root-test-slow root-bench
root-demo root-test root-test-slow root-bench: root-%:
	@$(if $(filter 0,$(shell id -u)),,$(error make $* needs root, for namespaces and ptrace: sudo make $*))
	@tools/need "make $*" $(BASE_NEEDS)

# `make help` lists what there is.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMPAT := .venv-compat
# The first of these that runs and is new enough; `make PYTHON=...` overrides.
PYTHON = $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)
JOBS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv serve test lint types format bench bench-compare crash-test train-embedded settings-doc compat-test dashboards-test schemas-test docker-test k8s-check clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 18
	@echo "ARGS='...' is handed to the command behind a target, as in: make serve ARGS='--port 9000'"

venv: $(INSTALLED) ## make .venv with everything, development tools included

$(INSTALLED): requirements.lock requirements-otel.lock requirements-dev.lock pyproject.toml
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "Quire needs Python 3.11 or 3.12; name one with make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

serve: $(INSTALLED) ## serve the embedded model on port 8000
	$(BIN)/quire serve $(ARGS)

test: lint types ## lint, types and the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

schemas-test: $(INSTALLED) ## 500 random JSON schemas instead of 100
	TEST_SCHEMAS=500 $(BIN)/python -m pytest tests/engine/test_grammar.py -k parses

lint: $(INSTALLED) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy --strict
	$(BIN)/mypy

format: $(INSTALLED) ## put every file into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## tokens/s, TTFT, TPOT and ITL at 1, 16 and 64 clients
	$(BIN)/python -m benchmarks.serve $(ARGS)

bench-compare: $(INSTALLED) ## Quire and its peers in turn (python -m benchmarks.peers.install first)
	$(BIN)/python -m benchmarks.compare $(ARGS)

crash-test: $(INSTALLED) ## kill -9 an engine while its disk tier writes, 50 times
	$(BIN)/python -m tests.engine.crash_disk_tier $(ARGS)

train-embedded: $(INSTALLED) ## train the small model that comes along
	$(BIN)/python -m models.embedded.train $(ARGS)

settings-doc: $(INSTALLED) ## write docs/settings.md from the settings tree
	$(BIN)/python -m configs.settings_doc

compat-test: $(INSTALLED) $(COMPAT)/.installed ## other people's clients and hostile ones against a real server
	$(BIN)/python -m tests.compat.serve $(COMPAT)/bin/python -m pytest -o asyncio_default_test_loop_scope=session -rsP tests/compat $(ARGS)

# litellm asks for older packages than ours: these clients live in an environment of their own.
$(COMPAT)/.installed: requirements-compat.lock | $(INSTALLED)
	@test -x $(COMPAT)/bin/python || $(BIN)/python -m venv $(COMPAT)
	$(COMPAT)/bin/pip install --quiet --disable-pip-version-check -r requirements-compat.lock
	@touch $@

dashboards-test: $(INSTALLED) ## try board and alert rules with a real Prometheus (apt-get install prometheus)
	@command -v prometheus promtool >/dev/null || { echo "prometheus and promtool are missing" >&2; exit 1; }
	$(BIN)/python -m pytest tests/test_dashboards.py

k8s-check: ## hold configs/k8s to the published schemas; needs Node
	cd tests/k8s && npm install --no-package-lock --silent && node check.mjs

docker-test: ## build the image and try it with Prometheus (BASE_IMAGE, PROMETHEUS_IMAGE)
	tests/docker/run.sh

clean: ## remove .venv and caches
	rm -rf $(VENV) $(COMPAT) .mypy_cache .pytest_cache .ruff_cache *.egg-info

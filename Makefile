# Assay in a few commands; needs Python 3.11 (with venv) and make. `make help` lists them.

SHELL := /bin/sh
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := torch,transformers,storage,serve,jobs,evaluate,train,dev
ARGS ?=

.PHONY: help setup demo test check format clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

# Skipped in a moment when nothing changed: the stamp holds a checksum of what decides the installation.
setup:  ## create .venv and install everything, pinned
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "setup: $(PYTHON) is missing; install Python 3.11, or name another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: $(PYTHON) is older than 3.11; name another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "setup: $(PYTHON) has no venv module; install it (Debian: apt-get install python3.11-venv)" >&2; exit 1; }
	@key=$$( { cat pyproject.toml constraints.txt; echo "$(EXTRAS)"; pwd; } | cksum ); \
	if [ -x $(BIN)/python ] && [ "$$key" = "$$(cat $(VENV)/.installed 2>/dev/null)" ]; then exit 0; fi; \
	set -e; rm -f $(VENV)/.installed; \
	echo "setup 1/3: virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); \
	torch=$$(grep '^torch==' constraints.txt); \
	echo "setup 2/3: $$torch (the largest part; a minute or more)"; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check "$$torch" -c constraints.txt; \
	echo "setup 3/3: Ray, storage clients, tools (about a minute)"; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' -c constraints.txt; \
	echo "$$key" > $(VENV)/.installed; \
	echo "setup: done"

demo: setup  ## a night from S3 through Ray Serve into scored Parquet, all on this machine
	@$(BIN)/python -m jobs.demo $(ARGS)

test: setup  ## run the tests; make test ARGS="-k policy" runs some of them
	@$(BIN)/python -m pytest $(ARGS)

check: setup  ## what CI runs: format, lint, types, tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest $(ARGS)

format: setup  ## format the code and fix what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment, caches and what the demo wrote
	@if [ -n "$$(find .assay -name processes.json 2>/dev/null)" ]; then \
		echo "clean: .assay says that a demo runs, or was killed; stop it, or run it once more to clean up" >&2; exit 1; fi
	@rm -rf $(VENV) .assay .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	@find model jobs deployments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target makes the environment it needs and is quick when that exists.
#   PYTHON=python3.12          the interpreter .venv is made with, 3.11 or newer
#   PIP_ARGS="--index-url ..." where packages come from, for instance a site's own build of torch

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
BIN := .venv/bin
# exact versions: Python 3.11 has Megatron-core up to 0.16, from 3.12 on the newest
CONSTRAINTS = $(shell $(BIN)/python -c 'import sys; print("constraints" + "-py312" * (sys.version_info > (3, 12)) + ".txt")')
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help train demo-data test test-all lint format clean

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1: \2/p' $(MAKEFILE_LIST)

train: .venv/.run  ## text -> shards -> trained model -> perplexity -> samples -> Hugging Face folder, on this machine
	$(BIN)/python tools/run_demo.py

demo-data: .venv/.run  ## the demo's corpus, tokenizer and shards alone (data/demo)
	$(BIN)/python tools/prepare_data.py --demo --output data/demo

test: .venv/.dev  ## the tests, without those that take minutes
	$(BIN)/python -m pytest -m "not slurm and not faults and not slow" $(PYTEST_ARGS)

test-all: .venv/.dev  ## every test; those marked slurm need root and Debian's Slurm packages
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.dev  ## formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: .venv/.dev  ## repair formatting and what ruff can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment; data/ and runs/ stay
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than Python 3.11; use make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null; } \
	  || { echo "$(PYTHON) cannot make virtual environments; use: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml constraints.txt constraints-py312.txt | .venv/bin/python
	@echo 'installing the pinned packages into .venv: minutes, the first time'
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt constraints-py312.txt | .venv/bin/python
	@echo 'installing the pinned packages and the tools for tests into .venv: minutes, the first time'
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ .venv/.run

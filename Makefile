# Needs Python >= 3.11 and make, nothing else. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q \
	$(PIP_ARGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e
# One thread a process: several test processes share the cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci

.DEFAULT_GOAL := help
.PHONY: help demo install test test-all lint format types imports doctest unit bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(VENV)/.demo ## train a small network, halve its MACs, check and time the result (runs/demo)
	$(BIN)/prunewise demo

install: $(VENV)/.dev ## make the virtual environment with all that development needs

test: lint types imports doctest unit ## what CI runs: lint, types, import rules, doctests, fast tests

test-all: $(VENV)/.dev ## every test, the slow ones too
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m "not gpu"

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## mypy, strict, on src
	$(BIN)/mypy

imports: $(VENV)/.dev ## the import rules between packages
	$(BIN)/lint-imports

doctest: $(VENV)/.dev ## the examples in the docstrings
	$(TEST_ENV) $(BIN)/python -m pytest -q --doctest-modules src

unit: $(VENV)/.dev ## the fast tests
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not gpu"

bench: ## list the benchmark scripts; each writes to benchmarks/results/
	@for script in $(sort $(wildcard benchmarks/[a-z]*.py)); do \
		printf '%-44s %s\n' "$(BIN)/python $$script" "$$(sed -n '1s/^"""\([^"]*\).*/\1/p' $$script)"; \
	done

clean: ## remove the virtual environment, caches and build products
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prunewise needs Python >= 3.11, and $(PYTHON) is " \
		+ sys.version.split()[0] + "; name another one: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) '.[cli,demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) '.[dev]'
	@touch $@

# Two commands for everyone: `make demo` and `make test`. Each makes its own .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format types contracts docs check clean help

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# A stamp file per set of extras: made again only when what it was made from has changed.
# torch is installed by itself first, so that no other package can choose its version.
$(VENV)/.%.stamp: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*.?pp)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) --editable '.[$*]'
	touch $@

demo: $(VENV)/.demo.stamp ## the tour on real data; prints where the report is
	$(BIN)/batchnorm demo

test: $(VENV)/.test.stamp ## the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.dev.stamp ## ruff: style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev.stamp ## ruff: format in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev.stamp ## mypy --strict on the package
	$(BIN)/mypy

contracts: $(VENV)/.dev.stamp ## import-linter: imports run downward only
	$(BIN)/lint-imports

docs: $(VENV)/.dev.stamp ## the manual, warnings as errors
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html

check: lint types contracts docs test ## everything that CI runs

clean: ## remove what the commands above made
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

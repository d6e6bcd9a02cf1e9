# `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Where Python is told to keep no bytecode, it would rewrite and compile all tests again in every run.
# As many workers as cores, at most four: each collects all tests, and takes seconds for it.
WORKERS := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores : 4)))
SCHEMA := $(BIN)/check-jsonschema --quiet --builtin-schema
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check coverage soak docs results release-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' Makefile

$(VENV)/.created: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d found, 3.11 or newer needed; run: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed ## Make data, train, evaluate, save, reload and predict, offline
	$(BIN)/qwen-vl-classifier demo --overwrite

test: $(VENV)/.installed-dev ## Lint, types and tests
	@started=$$(date +%s); $(MAKE) --no-print-directory --jobs 2 lint types check && \
		echo "make test took $$(($$(date +%s) - started)) s"

lint: $(VENV)/.installed-dev ## Check style, spelling and the files for GitHub
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(SCHEMA) vendor.github-workflows .github/workflows/*
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/*

types: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy

check: $(VENV)/.installed-dev ## Run the tests
	$(PYTEST) -m "not soak" --durations 10

coverage: $(VENV)/.installed-dev ## Run the tests, and print which lines of the package they reach
	$(PYTEST) -m "not soak" --cov --cov-report term

soak: $(VENV)/.installed-dev ## Run the long variants of the tests too
	$(PYTEST) --hypothesis-profile explore --durations 10

docs: $(VENV)/.installed-dev ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: $(VENV)/.installed-dev ## Measure again what docs/figures/results.md shows (needs DATA=folder)
	$(BIN)/python scripts/results.py --data "$(DATA)"

release-check: $(VENV)/.installed-dev ## Build the release, and use it in a clean environment
	$(BIN)/python scripts/release_check.py

clean: ## Remove the environment and what the demo made
	rm -rf $(VENV) demo build dist site *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis

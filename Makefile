# Everything runs in .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
DATA := $(abspath $(wildcard ../shared/data))
export RD_TORCH_DATA ?= $(DATA)

.PHONY: setup demo test test-all test-oldest check format lint types docs clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group dev
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py --output demo

test: setup
	$(BIN)/pytest -m "not slow"

test-all: setup
	$(BIN)/pytest

# The tests on the oldest versions that the package admits.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-oldest/bin/pip install --quiet --group oldest
	.venv-oldest/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	.venv-oldest/bin/pytest -m "not slow"

# The documentation is executed by the tests.
check: lint types test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/pytest tests/test_docs.py -q

clean:
	rm -rf .venv .venv-oldest demo build dist .pytest_cache .mypy_cache .ruff_cache

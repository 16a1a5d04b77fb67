# Everything runs in .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
DATA := $(wildcard ../shared/data)
export RD_TORCH_DATA ?= $(DATA)

.PHONY: setup demo test test-all check format lint types docs clean

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

check: lint types docs test

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
	rm -rf .venv demo build dist .pytest_cache .mypy_cache .ruff_cache

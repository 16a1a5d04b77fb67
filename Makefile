# Everything runs in .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
DATA := $(abspath $(wildcard ../shared/data))
export RD_TORCH_DATA ?= $(DATA)
unexport PYTHONDONTWRITEBYTECODE # or each of the tests' processes compiles every file again

# Files of tests run side by side, each process with one thread; on two cores four keep both busy, for some wait
# for processes of their own. Those marked `alone`, which measure time, run after them.
WORKERS ?= 4

# Called with an environment and with what is selected.
define run-tests
	OMP_NUM_THREADS=1 $(1)/bin/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m "$(2) and not alone"
	$(1)/bin/pytest -m "$(2) and alone"
endef

# What holds PyTorch and oneDNN to the vector units that every x86-64 CPU of today has.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2

.PHONY: setup demo test test-all test-portable test-capabilities test-oldest check format lint types docs clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group dev
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo --output demo

test: setup
	$(call run-tests,.venv,not slow)

test-all: setup
	$(call run-tests,.venv,(slow or not slow))

# The tests as a machine with AVX2 and nothing newer runs them.
test-portable: setup
	$(AVX2) $(MAKE) test

# The part of them that depends on what the CPU has.
CAPABILITIES = $(shell grep -l "mark.capability" tests/*.py)
test-capabilities: setup
	$(AVX2) OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) -m "capability and not slow" $(CAPABILITIES)

# The tests on the oldest versions that the package admits.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-oldest/bin/pip install --quiet --group oldest
	.venv-oldest/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(call run-tests,.venv-oldest,not slow)

# The documentation is executed by the tests.
check: lint types test test-capabilities

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

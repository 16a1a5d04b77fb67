# Everything runs in .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
# Another version of PyTorch than the pinned one, as `make check TORCH=2.14.1`; `make clean` before and after.
TORCH ?=
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

.PHONY: setup demo test test-all test-portable test-capabilities test-oldest coverage package check format lint types docs pictures clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group dev
	$(if $(TORCH),$(BIN)/pip install --quiet "torch==$(TORCH)")
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

# Which lines of the package the tests run; the pages are in htmlcov/.
coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not slow and not alone" --cov --cov-report=term --cov-report=html

# The wheel and the source distribution in dist/, after what is in the wheel has run in an empty environment.
package: setup
	$(BIN)/pytest tests/test_package.py -m "slow or not slow"
	rm -rf dist
	$(BIN)/hatchling build

# What the documentation says is executed by the tests.
check: lint types docs test test-capabilities

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

# The documentation as a site, in site/: without network, and every warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The pictures of the tutorials, as their blocks draw them.
pictures: setup
	$(BIN)/python tests/pages.py

clean:
	rm -rf .venv .venv-oldest demo site build dist htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache

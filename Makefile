# make demo: a slide into a virtual IHC pyramid.   make test: the tests.   make help: the rest.
# Each target first makes .venv from setup.cfg under the versions pinned in .ci/constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
DEMO ?= demo
N ?= 200
SEED ?= 0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
# A plain path file: setuptools' import hook costs 20 ms at every start.
EDITABLE := --config-settings editable_mode=compat -e
PINS := setup.cfg pyproject.toml .ci/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-cluster fuzz lint format docs bench clean

help:
	@echo "make demo      translate a small real slide, check it, write its report ($(DEMO)/)"
	@echo "make test      the tests: no GPU, no network, minutes"
	@echo "make test-all  the slow tests too"
	@echo "make test-cluster  schedulers and workers that die; a real Slurm (root, slurm-wlm, munge)"
	@echo "make fuzz      damaged inputs, N=$(N) of them from SEED=$(SEED) on"
	@echo "make lint      style, types, import rules"
	@echo "make format    put the style right"
	@echo "make docs      the page of the command line, from the code"
	@echo "make bench     one measurement per promise, as JSON lines"
	@echo "make clean     remove .venv, the demo and caches"

demo: .venv/run.stamp
	$(BIN)/wsi-stain sample $(DEMO)
	$(BIN)/wsi-stain translate $(DEMO)/CMU-1-Small-Region.svs --out $(DEMO) --overwrite
	$(BIN)/wsi-stain validate $(DEMO)/CMU-1-Small-Region_ki67.ome.tiff
	@echo "report:      $(DEMO)/CMU-1-Small-Region_ki67.run/report/index.html (open in a browser)"
	@echo "H&E:         $(DEMO)/CMU-1-Small-Region.svs"
	@echo "virtual IHC: $(DEMO)/CMU-1-Small-Region_ki67.ome.tiff (open both in QuPath)"
	@echo "your slide:  source $(BIN)/activate, then wsi-stain translate slide.svs"

test: .venv/test.stamp
	$(BIN)/python -m pytest

test-all: .venv/test.stamp
	$(BIN)/python -m pytest -m ""

test-cluster: .venv/test.stamp
	$(BIN)/python -m pytest tests/cluster -m cluster -rs

fuzz: .venv/test.stamp
	$(BIN)/python tests/fuzz/fuzz.py --cases $(N) --seed $(SEED)

lint: .venv/test.stamp .venv/lint.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/lint.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/run.stamp
	$(BIN)/python docs/reference.py

bench: .venv/test.stamp .venv/bench.stamp
	@set -e; for bench in tests/benchmarks/bench_*.py; do $(BIN)/python "$$bench"; done

clean:
	rm -rf .venv $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
	    .hypothesis .import_linter_cache

# ---- the environment ----------------------------------------------------------------------------

.venv/pip.stamp:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "wsi-stain needs Python 3.11 or later, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }
	"$(PYTHON)" -m venv .venv >/dev/null || { \
	    "$(PYTHON)" -m venv --clear --without-pip .venv && \
	    "$(PYTHON)" -m pip --python .venv install --quiet pip; }
	@touch $@

.venv/run.stamp: .venv/pip.stamp $(PINS)
	$(PIP) -c .ci/constraints.txt $(EDITABLE) .
	@touch $@

.venv/%.stamp: .venv/pip.stamp $(PINS)
	$(PIP) -c .ci/constraints.txt $(EDITABLE) '.[$*]'
	@touch $@

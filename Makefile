# make run    every notebook, in order, on the synthetic phantom world; writes into runs/phantom
# make test   format, types, and the tests, all notebooks at smoke size among them
# make test-all   these and the slow ones: ZeRO stages, kills at random points, launchers, real images, a benchmark
# On Linux without a GPU, add TORCH_INDEX=https://download.pytorch.org/whl/cpu to get torch's small CPU build.

PYTHON ?= python3
PROFILE ?= phantom
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# See mmedpo_utils/__init__.py; a notebook's kernel may load torch before the package.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run check test test-all lab results arena base-models bench

run: .venv/installed
	$(BIN)/mmedpo notebooks --profile $(PROFILE)

test: .venv/installed check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-all: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m ''

lab: .venv/installed
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

results: .venv/installed
	$(BIN)/mmedpo results

arena: .venv/installed
	$(BIN)/mmedpo arena

base-models: .venv/installed
	$(BIN)/mmedpo build-medklip
	$(BIN)/mmedpo build-lvlm

bench: .venv/installed
	$(BIN)/python benchmarks/curate.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/view_latency.py

.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(INSTALL) --editable '.[croissant,dicom,gpu,notebooks,test]'
	touch $@

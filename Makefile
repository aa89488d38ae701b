# Every target sets up what it needs in .venv; only Python >= 3.11, make and a package index are assumed.
#   make reproduce SECTION="01 02" PRESET=gpu JOBS=2
PYTHON ?= python3
PRESET ?=
SECTION ?=
JOBS ?= 1
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Nothing is compiled at installation, which halves its time; the first import writes the bytecode.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --no-compile -c constraints.txt
# One worker a core, and one torch thread a worker (tests/conftest.py): threads of several would wait for each other.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-fast lint lab gpu bench docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## install the package and its pinned dependencies into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; pass PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[test]'
	touch $@

reproduce: setup  ## run the notebooks and build the report (SECTION=01 PRESET=quick|real|gpu|paper JOBS=1)
	$(BIN)/subtuning-lab reproduce $(SECTION) --preset $(or $(PRESET),quick) --jobs $(JOBS)

test: setup  ## run all tests, side by side on all cores
	$(PYTEST)

test-fast: setup  ## run the tests that take a minute together: what a change is tried with
	$(PYTEST) -m "not slow"

lint: setup  ## check the style of code and notebooks
	$(BIN)/python -m ruff check .

lab: setup  ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab notebooks

gpu: setup  ## what a GPU is for: tests, speed, latency and real runs; see scripts/gpu_day.py
	$(BIN)/python scripts/gpu_day.py run

bench: setup  ## run every benchmark
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

docs: setup  ## draw the rooms and list the public names (docs/architecture.svg, docs/api.md)
	$(BIN)/python scripts/draw_rooms.py

clean:  ## remove the environment, builds and caches (results and records stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find subtuning_lab tests notebooks scripts benchmarks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# Everything a fresh clone needs: Python 3.11 or newer, make and the package index.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
export WANDB_SILENT ?= true

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check results clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(INSTALLED)  ## create .venv with the pinned packages

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv (seconds to two minutes)"
	@$(BIN)/python -m pip install --quiet uv==0.13.8
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@touch $@

demo: $(INSTALLED)  ## learn solvers of 6, 8 and 10 network calls for a shipped model, in minutes: runs/demo/
	@$(BIN)/python learn.py checkpoints/fashion-sit --guidance_scale 2 --calls 6 8 10 --dtype auto --output runs/demo

results: $(INSTALLED)  ## every solver on all base models, hours: docs/results.md
	@$(BIN)/python benchmarks/results.py

test: $(INSTALLED)  ## the default test suite, a few minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(INSTALLED)  ## every test, the slow ones too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(INSTALLED)  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

clean:  ## remove the environment and the runs of the demo
	rm -rf .venv runs/demo

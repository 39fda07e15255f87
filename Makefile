# One target a task; each makes .venv by itself. CI runs the same targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev

.DEFAULT_GOAL := help
.PHONY: help setup check test test-gpu sanitize demo bench clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## Make .venv with the pinned packages

# torch comes first and alone: its pin decides between the CPU build and gigabytes of CUDA packages
$(STAMP): pyproject.toml constraints.txt
	@echo "making $(VENV) (once; about three minutes and 3 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(STAMP)

check: setup  ## Lint, format, types, packaging of the Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

test: setup  ## All tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: setup  ## The tests that need an NVIDIA GPU (skipped, with the reason, without one)
	$(BIN)/python -m pytest -m gpu

demo: setup  ## The whole road on phantom CT: demo/report.html
	$(BIN)/ftengine demo --out demo

sanitize: setup  ## compute-sanitizer over the kernels' GPU tests (needs an NVIDIA GPU and the CUDA toolkit)
	for tool in memcheck racecheck initcheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest -m gpu tests/kernels -k "not 2_to_31" || exit 1; \
	done

bench: setup  ## Side-by-side measurements; results are printed
	$(BIN)/ftengine bench store
	$(BIN)/ftengine bench kernels
	$(BIN)/ftengine bench convert
	$(BIN)/ftengine bench scale

clean:  ## Remove what the targets made
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

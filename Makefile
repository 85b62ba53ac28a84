# `make demo` and `make test` do all the set-up. On a bare machine they need only Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

# The tests' models are so small that several threads only wait for each other, at twice the processor time.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo test test-slow lint benchmark clean

demo: .venv/installed  ## compress the embedded model; the run is in ./blockspin-demo
	$(BIN)/blockspin demo

test: .venv/installed  ## the default tests
	$(ONE_THREAD) $(BIN)/python -m pytest

test-slow: .venv/installed  ## the slow ones
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow

lint: .venv/installed  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmark: .venv/installed  ## the short ones of docs/benchmarks.md
	$(BIN)/python benchmarks/gradients.py
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/shared_prefix.py
	$(BIN)/python benchmarks/prune.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv dist blockspin-demo

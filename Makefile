PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo compare bench benchmarks faults test test-fast check

demo: .venv/ready  ## the whole job on a synthetic world
	$(BIN)/tvl-align demo

compare: .venv/ready  ## every method, three seeds, one report
	$(BIN)/tvl-align contest

bench: .venv/ready  ## what things cost, as ratios
	$(BIN)/python -m benchmarks.speed

benchmarks: .venv/ready  ## methods on data of others; DATA=folder of clones
	$(BIN)/python -m benchmarks.away --data "$(DATA)"

faults: .venv/ready  ## the fault campaign: half an hour
	$(BIN)/python tests/faults.py

test: .venv/ready  ## every test
	OMP_NUM_THREADS=1 $(BIN)/pytest

test-fast: .venv/ready  ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow"

check: .venv/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

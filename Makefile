PYTHON ?= python3
BIN := .venv/bin
WITHOUT := "base --num_cross_attn_layers 0" "base --no_linear" "base --resolution 0" "base --trunk_layers 0" "base --input_dropout 0" \
	"base --independence_weight 0" "base --preservation_weight 0"

.PHONY: demo compare ablation bench benchmarks faults screenshots test test-fast check docs

demo: .venv/ready  ## the whole job on a synthetic world
	$(BIN)/tvl-align demo

compare: .venv/ready  ## every method, three seeds, one report
	$(BIN)/tvl-align contest

ablation: .venv/ready  ## what each part of the base brings: three worlds, three seeds
	$(BIN)/tvl-align contest --out ablation --worlds 3 --methods base $(WITHOUT)

bench: .venv/ready  ## what things cost, as ratios
	$(BIN)/python -m benchmarks.speed

benchmarks: .venv/ready  ## methods on data of others; DATA=folder of clones
	$(BIN)/python -m benchmarks.away --data "$(DATA)"

faults: .venv/ready  ## the fault campaign: half an hour
	$(BIN)/python tests/faults.py

screenshots: docs  ## PNGs of the documentation, the demo's and the comparison's page, as a desktop and a phone show them; or of PAGES
	$(BIN)/python tests/browser/screenshots.py $(or $(PAGES),site/*.html $(wildcard demo/runs/base contest/report.html))

test: .venv/ready  ## every test
	OMP_NUM_THREADS=1 $(BIN)/pytest

test-fast: .venv/ready  ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow"

check: .venv/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready  ## the documentation -> site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Everything runs in .venv, which `make setup` makes; only Python 3.11 or newer with pip and venv, and make, must be there.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-fleet test bench docs dist lint format clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install ctsft with its tools, again only after pyproject.toml or constraints.txt changed

$(STAMP): pyproject.toml packages/ctsft-photonic/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e packages/ctsft-photonic -e '.[dev]' -c constraints.txt
	@touch $@

# Threads beyond the cores cost more than they bring. A value from the environment stands.
demo: export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.physicalcpu 2>/dev/null || echo 1)
demo: setup ## fine-tune SmolLM2-135M on questions about databases; the result is in runs/demo
	$(BIN)/ctsft tune --model smollm2-135m --data sql --form gains --k 64 --steps 60 --out runs/demo --overwrite

demo-fleet: export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.physicalcpu 2>/dev/null || echo 1)
demo-fleet: setup ## learn directions from some databases, then serve one never seen in a minute; the result is in runs/fleet
	$(BIN)/python examples/fleet.py --out runs/fleet

test: export OMP_NUM_THREADS ?= 1
test: lint ## lint, then all tests, on up to four cores
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

bench: export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.physicalcpu 2>/dev/null || echo 1)
bench: setup ## run the short benchmarks and write benchmarks/RESULTS.md; best on an idle machine
	$(BIN)/python benchmarks/run.py

docs: setup ## build the site from docs/ into build/docs; a warning is an error
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build -q -W --keep-going -d build/doctrees docs build/docs

dist: setup ## build wheels and source archives into dist/, and try them in an empty environment
	$(BIN)/python .ci/dist.py

lint: setup ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/ctsft.egg-info packages/*/build packages/*/src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

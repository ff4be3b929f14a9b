PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test nightly lint world clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/headwater run recipes/quickstart.toml --out runs/quickstart

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow and not gpu'

nightly: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[environments]'
	$(BIN)/pytest -m 'not gpu'

world: setup
	$(BIN)/python scripts/pretrain_world.py

clean:
	rm -rf .venv runs

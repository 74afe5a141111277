# Everything a developer does has a verb here. Only python3 (>= 3.11) with venv is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test lint types unit fuzz bench clean

$(READY): setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kvtcp needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test,shell,bench]'
	touch $(READY)

run: $(READY)
	exec $(BIN)/python bin/kvtcp-coordinator --num-nodes 3 --replication-factor 3 --main-port 8000 --base-port 5000 --data-dir data

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest -q

# FUZZ=<inputs> and SEED=<seed> of a failure to repeat it
fuzz: $(READY)
	$(BIN)/python tests/fuzz_framing.py $(or $(FUZZ),1000000) $(SEED)

bench: $(READY)
	$(BIN)/python bench/run_bench.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

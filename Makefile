# Everything a developer does has a verb here. Only python3 (>= 3.11) with venv is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_READY := $(VENV)/.run-ready
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
# of `make run`
MAIN_PORT ?= 8000
BASE_PORT ?= 5000
DATA_DIR ?= data

.PHONY: run test test-all lint types unit slow model fuzz sim mutants crash kills chaos redis-suite compiled pure bench bench-full
.PHONY: bench-check bench-report clean

# kvtcp with the extras EXTRAS; a venv that was interrupted half-way, or whose Python is gone, is replaced
define install
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kvtcp needs Python 3.11 or newer; set PYTHON=...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRAS)]'
	touch $(sort $(RUN_READY) $@)
endef

# what running needs
$(RUN_READY): EXTRAS := shell
$(RUN_READY): setup.py
	$(install)

# what all other verbs need besides
$(READY): EXTRAS := shell,test,bench
$(READY): setup.py pyproject.toml
	$(install)

# exec: the coordinator takes the place of the shell, so that a signal to it or Ctrl-C stops it cleanly
run: $(RUN_READY)
	exec $(BIN)/python bin/kvtcp-coordinator --num-nodes 3 --replication-factor 3 \
		--main-port $(MAIN_PORT) --base-port $(BASE_PORT) --data-dir $(DATA_DIR)

test: lint types unit

# with the tests that are marked slow: three minutes more
test-all: test slow

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# all tests but the slow ones; skipped ones are listed with their reasons
unit: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow'
	@echo 'Not run: tests marked slow (`make slow`), see README.md'

slow: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

# all scopes of the model of the replication rules: about ten minutes of one core; `make test` has the smaller ones
model: $(READY)
	$(BIN)/python -m tests.model.explore $(if $(JOBS),--jobs $(JOBS))

# FUZZ=<inputs> and SEED=<seed> of a failure to repeat it
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz.framing $(or $(FUZZ),1000000) $(SEED)
	$(BIN)/python -m tests.fuzz.resp $(or $(FUZZ),1000000) $(SEED)
	$(BIN)/python -m tests.fuzz.resp_sockets $(or $(FUZZ),20000) $(SEED)

# SEEDS=<number> and SEED=<seed>: the first of them, or the only one, to tell its story again
sim: $(READY)
	$(BIN)/python -m tests.simulation.run $(or $(SEEDS),$(if $(SEED),1,300)) $(if $(SEED),--first $(SEED))

# MUTANTS=<part of a name>: only these mutants
mutants: $(READY)
	$(BIN)/python -m tests.simulation.mutants $(MUTANTS)

# STATES=<recovered states to check> and SEED=<seed> of a failure to repeat it
crash: $(READY)
	$(BIN)/python -m tests.crash.enumeration $(or $(STATES),50000) $(SEED)

# KILLS=<number for each mode and factor> and SEED=<seed> of a run to repeat its kills
kills: $(READY)
	$(BIN)/python -m tests.crash.kill_run --kills $(or $(KILLS),100) $(if $(SEED),--seed $(SEED))

# MINUTES=<duration>, SEED=<seed> of a round to repeat its faults, FACTOR=<copies>, MIN_INSYNC=<fewest copies>
chaos: $(READY)
	$(BIN)/python -m tests.chaos.run --minutes $(or $(MINUTES),4) $(if $(SEED),--seed $(SEED)) \
		--factor $(or $(FACTOR),3) $(if $(MIN_INSYNC),--min-insync $(MIN_INSYNC)) --json chaos.json

# ONLY=<name of a test>; JOBS=<servers>; ARGS=... see `python -m tests.redis.suite --help`
redis-suite: $(READY)
	$(BIN)/python -m tests.redis.suite $(if $(JOBS),--jobs $(JOBS)) $(if $(ONLY),--test '$(ONLY)') $(ARGS)

# the coordinator's path of every request compiled in place; `make pure` goes back
compiled: $(READY)
	KVTCP_COMPILE=1 $(BIN)/python setup.py -q build_ext --inplace

pure:
	find . -path ./$(VENV) -prune -o \( -name '*.cpython-*.so' -o -name '*__mypyc*.so' \) -print | xargs -r rm -f
	rm -rf build

# six figures in two minutes: an indication
bench: $(READY)
	$(BIN)/python bench/run_bench.py --quick

# what bench-full compares with and draws; the servers among the peers: apt-get install redis-server redis-tools
# nutcracker memcached etcd-server etcd-client
$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet -e '.[bench,peers]'
	touch $(PEERS)

# everything, at most an hour, with verdicts, then docs/performance.md; SUITES=<names>: only these, without the page
bench-full: $(PEERS)
	$(BIN)/python bench/run_bench.py $(SUITES)
	$(if $(SUITES),,$(BIN)/python bench/report/page.py)

# docs/performance.md and its charts from the newest full run
bench-report: $(PEERS)
	$(BIN)/python bench/report/page.py

# what became slower by more than 10 % since BASE=<commit> (default: the last tag, or HEAD~1); ROUNDS=<number>
bench-check: $(READY)
	$(BIN)/python bench/check.py $(if $(ROUNDS),--rounds $(ROUNDS)) $(BASE)

clean:
	rm -rf $(VENV) .redis-suite build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

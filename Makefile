# make demo   a sale, a dead network, a killed process: one minute, by itself
# make test   everything that must hold, with its negative controls
# make check  the quick part of it: format, lint, types, import contracts, unit tests
# make soak   the long campaigns: power cuts, damage, faults at every system call; hours
# make mutants  changes to what decides that no test would notice; ten minutes
# make bench  speed, as ratios against a peer measured in the same run
# Each sets up what it needs. Another Python: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Which changes to what decides the tests would not notice: docs/mutation.md.
mutants: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt mutmut
	$(BIN)/mutmut run
	$(BIN)/mutmut results

# Every branch of the kernels, by their own tests.
coverage: $(READY)
	$(BIN)/pytest -q -n auto --cov=terminal.emv --cov-branch --cov-fail-under=98 --cov-report=term:skip-covered \
		tests/test_emv_*.py tests/test_cards_kernel.py tests/test_fuzz_corpus.py tests/test_replay_*.py

.PHONY: demo test check format lint types contracts unit coverage mutants processes soak bench screens messages clean

demo: $(READY)
	$(BIN)/payterm-sim demo

test: check coverage processes

check: lint types contracts unit

$(READY): setup.sh setup.py pyproject.toml constraints.txt debian-packages.txt
	PYTHON=$(PYTHON) VENV=$(VENV) ./setup.sh
	touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

contracts: $(READY)
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/pytest -m "not processes" -n auto --dist loadgroup

# The real services as processes, killed and cut off. Two at a time, since they mostly wait for something; but disks that
# are pulled out must not be held by somebody else's mount namespace.
processes: $(READY)
	$(BIN)/pytest -m processes tests/test_disk.py
	$(BIN)/pytest -m processes -n 2 --dist loadgroup --ignore tests/test_disk.py

soak: $(READY)
	PYTHONPATH=tests:hw-sim $(BIN)/python -m tests.soak.power_cut --states 100000
	PYTHONPATH=tests:hw-sim $(BIN)/python -m tests.soak.corruption --flips 20000 --blocks 5000
	PYTHONPATH=tests:hw-sim $(BIN)/python -m tests.soak.syscalls
	KILL_SWEEP=all $(BIN)/pytest tests/test_kill.py
	$(BIN)/python -m tests.soak.model
	PYTHONPATH=tests:hw-sim $(BIN)/python -m tests.soak.chaos --sales 200000
	for target in tlv dol atr described contact contactless; do \
		PYTHONPATH=tests:hw-sim $(BIN)/python -m tests.fuzz $$target --runs 1000000 || exit 1; done

bench: $(READY)
	$(BIN)/python -m tests.bench

# Record the pictures of all screens anew, after looking at them.
screens: $(READY)
	$(BIN)/pytest tests/test_screens.py --ui=record
	$(BIN)/python -m tests.gallery

# Compile the translations.
messages: $(READY)
	$(BIN)/pybabel compile --domain payterm --directory terminal/ui/locale

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# `make demo` and `make test` work on a fresh clone; the others are for development.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo mini test test-all faults soak lint clean

help:
	@echo "make demo      install, then run the whole pipeline in small: data to distilled student (CPU, under 30 minutes)"
	@echo "make mini      the paper's tables in miniature: what has no result yet (90 s a run; MINI=--help for its options)"
	@echo "make test      install, then run the fast tests (under 15 minutes on 2 cores)"
	@echo "make test-all  the fast tests and the long ones"
	@echo "make faults    break things on purpose: every fault of docs/faults.md (under 30 minutes)"
	@echo "make soak      kill a run hundreds of times and report what it cost"
	@echo "make lint      ruff"
	@echo "make clean     remove the virtual environment; runs in workspace/ stay"

demo: $(BIN)/.train
	$(BIN)/vitruvian run demo

mini: $(BIN)/.train
	$(BIN)/python -m benchmarks.mini.run $(MINI)

test: $(BIN)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-all: $(BIN)/.test
	$(BIN)/python -m pytest -m ""

faults: $(BIN)/.test
	$(BIN)/python -m pytest -m fault

soak: $(BIN)/.test
	$(BIN)/python -m tests.faults.soak

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv

# A stamp is newer than what it was installed from; with the test extra the train extra is there too.
$(BIN)/.train: pyproject.toml constraints.txt | $(BIN)/python
	[ $(BIN)/.test -nt pyproject.toml -a $(BIN)/.test -nt constraints.txt ] || $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	touch $@

$(BIN)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# Two commands on a fresh machine: `make demo` and `make test`. Each makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --retries 5

.PHONY: demo test test-slow faults lint browser clean

demo: $(VENV)/.samples
	$(BIN)/harmconvert demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

# Everything that is meant to break it, counted (SECURITY.md): about an hour on two cores.
FAULTS = benchmarks/results/faults.csv
faults: $(VENV)/.dev
	rm -f $(FAULTS)
	HARMCONVERT_FAULTS=long HARMCONVERT_FAULTS_TABLE=$(CURDIR)/$(FAULTS) $(BIN)/python -m pytest -n 2 tests/faults
	$(BIN)/python -m tests.faults.tally $(FAULTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the tests of the report page open it in; without it they are skipped, and say so.
browser:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

$(VENV)/.samples: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[samples]'
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.samples

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

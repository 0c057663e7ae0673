# Two commands on a fresh machine: `make demo` and `make test`. Each makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --retries 5

.PHONY: demo test test-slow test-oldest examples faults lint docs browser clean

demo: $(VENV)/.samples
	$(BIN)/harmconvert demo

# Two processes with one thread each. Many tests start Python, which is slow if it may not keep its compiled files.
unexport PYTHONDONTWRITEBYTECODE
PYTEST = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: $(VENV)/.dev
	$(PYTEST) --dist loadgroup -m "not slow"

test-slow: $(VENV)/.dev
	$(PYTEST)

# The scripts and the notebooks of examples/.
examples: $(VENV)/.dev
	$(PYTEST) tests/test_examples.py

# The fast suite on the oldest versions that pyproject.toml allows, on the oldest of these Pythons that is here. Without
# tests/faults and without figures and pages, which matplotlib, jinja2 and a browser make: no oldest version is
# promised of these.
OLDEST = $(shell sed -n '/^dependencies = /,/^]/s/^ *"\([a-z_]*\)>=\([0-9.]*\)",$$/\1==\2/p' pyproject.toml)
OLDEST_PYTHON ?= $(shell for p in python3.10 python3.11 python3.12 $(PYTHON); do \
	$$p -c 'import venv, ensurepip' 2>/dev/null && echo $$p && break; done)
test-oldest: $(VENV)-oldest/.dev
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadgroup -m "not slow" \
		--ignore tests/faults --ignore tests/test_figures.py --ignore tests/test_report.py

# Everything that is meant to break it, counted (SECURITY.md): about an hour on two cores.
FAULTS = benchmarks/results/faults.csv
faults: $(VENV)/.dev
	rm -f $(FAULTS)
	HARMCONVERT_FAULTS=long HARMCONVERT_FAULTS_TABLE=$(CURDIR)/$(FAULTS) $(PYTEST) tests/faults
	$(BIN)/python -m tests.faults.tally $(FAULTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in site/.
docs: $(VENV)/.dev
	$(BIN)/python docs/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

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

$(VENV)-oldest/.dev: pyproject.toml
	$(OLDEST_PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-oldest/bin/python -m pip install --quiet --retries 5 --editable '.[dev]' $(OLDEST)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

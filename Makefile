# make train | test | lint | bench | setup. The only thing needed beforehand is Python 3.11 or newer and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= omninft

.PHONY: setup train test lint bench clean

setup: $(VENV)/.ready

# The lock pins every version; `pip` resolves torch to the CPU or CUDA build that the configured index offers.
$(VENV)/.ready: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

train: setup
	$(BIN)/omninft train $(RECIPE)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.iteration
	$(BIN)/python -m benchmarks.scoring

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

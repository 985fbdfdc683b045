# make train | test | lint | bench | setup. The only thing needed beforehand is Python 3.11 or newer and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RECIPE ?= omninft
# Which build of torch: on Linux, PyPI's comes with 3 GB of CUDA, which a machine without an NVIDIA driver cannot use.
# `make setup TORCH=pypi` takes that one all the same (another accelerator, an image for another machine).
TORCH ?= $(shell test "$$(uname)" = Linux && ! command -v nvidia-smi > /dev/null && echo cpu || echo pypi)
CPU_BUILDS := https://download.pytorch.org/whl/cpu

.PHONY: setup train test lint bench clean

setup: $(VENV)/.ready

# The lock pins every version. Where the CPU builds are out of reach, torch is what the configured index offers.
$(VENV)/.ready: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(PIP) --no-deps --timeout 15 --retries 1 --index-url $(CPU_BUILDS) $$(grep '^torch==' requirements.lock) \
	  || echo "$(CPU_BUILDS) is out of reach: torch comes with the rest"
endif
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
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

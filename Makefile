# Two commands from a bare machine (Python >= 3.11 and make): `make quickstart` and `make test`.
#
# TORCH says which build of PyTorch to install, at the version that constraints.txt pins: `default` is
# whatever pip gives, `cpu` the build without CUDA, `cuda` the build with it, `preinstalled` the one
# that the system's Python has. Where pip's own index lacks a build, name one: TORCH_INDEX=URL.

PYTHON ?= python3
TORCH ?= default
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH_PIN := $(shell grep '^torch==' constraints.txt)
READY := $(VENV)/.ready

ifeq ($(TORCH),cpu)
TORCH_BUILD := $(TORCH_PIN)+cpu
else ifneq ($(filter $(TORCH),default cuda),)
TORCH_BUILD := $(TORCH_PIN)
else ifneq ($(TORCH),preinstalled)
$(error TORCH=$(TORCH) is none of default, cpu, cuda, preinstalled)
endif

.PHONY: quickstart test test-all lint setup clean

quickstart: setup
	$(BIN)/moebius train quickstart

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-all: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/pyright

setup: $(READY)

# A second run installs nothing: the stamp is newer than what it was made from.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moebius needs Python 3.11 or newer; set PYTHON=")'
ifeq ($(TORCH),preinstalled)
	$(PYTHON) -m venv --system-site-packages $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install --constraint $(VENV)/constraints.txt --editable ".[dev]"
else
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_BUILD)"
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
endif
	@touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build

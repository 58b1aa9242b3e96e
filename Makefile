# make demo   the whole way on a real model: quantize, save, reload, measure
# make test   all tests that run without a GPU
# Each target first creates .venv and installs hfq there; a second call finds that done.

VENV    ?= .venv
PYTHON  ?= python3
MODEL   ?=
DATA    ?=
OUTPUT  ?= out/demo
WORKERS ?= 2
ARGS    ?=

BIN   := $(VENV)/bin
READY := $(VENV)/.installed
# pytest workers share the cores; more threads in each only fight.
QUIET := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

.PHONY: help install check types test test-wheel test-gpu bench demo clean

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "targets: install check types test test-wheel test-gpu bench demo clean"

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "hfq needs Python 3.10 or newer: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $@

install: $(READY)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q tests/packaging -m "not slow" -p no:cacheprovider

types: $(READY)
	$(BIN)/mypy hfq integrations

test: $(READY)
	$(QUIET) $(BIN)/pytest -m "not gpu and not network" -n $(WORKERS) --dist worksteal $(ARGS)

# The wheel in an environment that holds nothing else of this checkout. Plain pytest: `python -m pytest` would put the
# checkout before the installed package.
test-wheel: $(READY)
	rm -rf build/wheel build/wheel-venv
	$(BIN)/python -m build --outdir build/wheel .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet -c constraints.txt "$$(ls build/wheel/*.whl)[test]"
	$(QUIET) build/wheel-venv/bin/pytest -m "not gpu and not network" -n $(WORKERS) --dist worksteal $(ARGS)

test-gpu: $(READY)
	$(BIN)/pytest -m gpu $(ARGS)

bench: $(READY)
	$(BIN)/hfq bench kernels $(ARGS)
	$(BIN)/hfq bench methods $(ARGS)

demo: $(READY)
	$(BIN)/python examples/llm/demo.py --output "$(OUTPUT)" $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

clean:
	rm -rf build dist out .pytest_cache .ruff_cache .mypy_cache .hypothesis hfq.egg-info
	find hfq integrations tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

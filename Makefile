# `make help` lists the targets. The first one that needs it makes .venv with $(PYTHON) and installs
# the package there in editable mode; later runs reuse it until a file it was made from changes.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo_output
# More arguments for pytest, for instance: make test PYTEST_ARGS='-m "not slow" --no-cov'
PYTEST_ARGS ?=
# One test process per core, four at most.
PYTEST_WORKERS ?= -n auto --maxprocesses 4 --dist loadfile

SHELL := /bin/bash
BIN := $(VENV)/bin
# The versions to install: the tested ones, or make test CONSTRAINTS=constraints-oldest.txt
CONSTRAINTS ?= constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

# Files that a source distribution must have, one of each folder.
IN_SDIST := constraints.txt docs/index.md tests/conftest.py benchmarks/README.md examples/demo.py zoo_hyperparams/trpo.yml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-oldest lint types docs package format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

demo: $(VENV)/.installed-demo ## train TRPO on CartPole, evaluate, save, load, draw the learning curve
	$(BIN)/python examples/demo.py --out $(DEMO_OUT)

test: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed-dev ## run all tests, with the coverage gate of pyproject.toml
	$(BIN)/python -m pytest $(PYTEST_WORKERS) --cov $(PYTEST_ARGS)

test-oldest: export OMP_NUM_THREADS := 1
test-oldest: ## run the tests with the oldest supported versions (needs Python 3.10)
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/.installed-extra,tests
	.venv-oldest/bin/python -m pytest $(PYTEST_WORKERS) --ignore tests/test_docs.py $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(VENV)/.installed-dev ## check types
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs ## build the documentation in docs/_build; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build

package: export OMP_NUM_THREADS := 1
package: $(VENV)/.installed-package ## build sdist and wheel, check them, try the wheel in an empty environment
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	for file in $(IN_SDIST); do tar -tzf dist/*.tar.gz | grep "/$$file$$" || exit 1; done
	$(PYTHON) -m venv dist/env
	dist/env/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) dist/*.whl
	cd dist && env/bin/python -c "from sb3_trpo import TRPO; TRPO('MlpPolicy', 'CartPole-v1', n_steps=64).learn(64).save('model'); TRPO.load('model')"
	cd dist && env/bin/sb3_trpo --version

format: $(VENV)/.installed-dev ## format the code, and fix what ruff can fix
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove everything that git does not track and make can make again
	rm -rf $(VENV) .venv-oldest $(DEMO_OUT) docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra of setup.cfg.
$(VENV)/.installed-%: setup.cfg pyproject.toml $(CONSTRAINTS) sb3_trpo/version.txt | $(VENV)/pyvenv.cfg
	$(INSTALL) -e ".[$*]"
	@touch $@

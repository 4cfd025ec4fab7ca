# Everything a contributor or CI runs. A machine needs python3 (>= 3.11), pip and make; the rest is installed here.
#
#   make test       the default suite          make check   lint, format, types, import direction
#   make test-slow  the runs that take minutes make demo    train the demo student and print what it gained

PYTHON ?= python3
VENV ?= .venv
# Absolute: some recipes and tests change the directory.
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
EXTRAS := test,dev,docs
TORCH := torch==2.13.0

# No test, check or demo needs a network, and none reports anything to anyone.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

PYTEST_ARGS ?=

.PHONY: venv test test-slow check format demo docs constraints clean
.DEFAULT_GOAL := test

venv: $(STAMP)

# The stamp is written last: an install that was cut off is done again. The package's own version lives in
# __init__.py, but an editable install has to see a change of it only when the project is released.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The slow runs train: their time limit is their own.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 2400 $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	$(BIN)/accelerate launch -m omniopd_trl.train --config recipes/demo.yaml

# The reference of the settings is written from the code, then the pages become a site in site/.
docs: $(STAMP)
	$(BIN)/python -m scripts.configuration_reference
	$(BIN)/mkdocs build --strict

# A new environment, the newest versions that pyproject.toml allows, written down.
constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e '.[$(EXTRAS)]'
	grep '^#' constraints.txt > build/constraints.txt
	build/constraints/bin/python -m pip freeze --exclude-editable | sed 's/^\(torch==[^+]*\)+.*/\1/' >> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

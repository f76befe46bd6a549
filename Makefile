# Every target works alone on a machine that has Python 3.11+ (with venv), g++ and make:
# the first one that is run makes .venv and installs what is needed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
# One stamp per version of torch, so that another TORCH installs again.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
TYPES := .types/stq_compile

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu bench-gpu nightly soak mutations lint types clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: $(STAMP)  ## make .venv and install everything into it

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install '$(TORCH)' -e '.[dev]'
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(STAMP)  ## train a small GPT with fp32 and with packed optimizer states (under 5 minutes)
	$(BIN)/python examples/train_gpt.py

test: $(STAMP)  ## the tests, without the slow ones and those that need a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(STAMP)  ## the slow tests
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-gpu: $(STAMP)  ## the tests that need a CUDA GPU (with a TORCH that knows it), and their peers
	$(BIN)/python -m pip install '$(TORCH)' -e '.[bench]'
	$(BIN)/python -m pytest -m gpu -s

bench-gpu: $(STAMP)  ## packed steps beside torch's, torchao's and bitsandbytes' on a CUDA GPU
	$(BIN)/python -m pip install '$(TORCH)' -e '.[bench]'
	$(BIN)/stq bench --device cuda --peers

nightly: $(STAMP)  ## every property test with ten times as many examples, over 10,000 in all
	HYPOTHESIS_PROFILE=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'hypothesis and not gpu' -n auto --timeout 7200

soak: $(STAMP)  ## 20,000 steps with widths that change: nothing grows, the loss does not drift
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

mutations: $(STAMP)  ## put faults in by hand, one by one: the tests must see each
	$(BIN)/python tests/mutations.py

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see setuptools' package mapping: show it the packages as they import.
types: $(STAMP)  ## mypy, strict
	rm -rf .types
	mkdir -p $(TYPES)
	ln -s $(CURDIR)/stq_compile/* $(TYPES)/
	ln -s $(CURDIR)/passes $(CURDIR)/codegen $(TYPES)/
	$(BIN)/mypy $(TYPES) examples | sed -E 's#^\.types/##; s#^stq_compile/(passes|codegen)/#\1/#'

clean:  ## remove everything that was made here
	rm -rf .venv .types .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist out *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

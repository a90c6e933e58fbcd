# The two commands of the README, and what developers need. Everything lives in .venv.
#   make up [ARGS="--workers 2"]     make test [ARGS="tests/engine -x"]

# The first Python that is new enough; `make PYTHON=… up` takes another.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# None is: the set-up says so, in the words of the one that is there.
PYTHON := $(or $(PYTHON),python3)
endif
BIN := .venv/bin

.PHONY: help up test lint bench clean python
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

# exec: the process that gets the signals and gives the exit status is openlora itself.
up: python  ## install, then serve the demo model with its adapters; ARGS="--port 9000"
	@$(PYTHON) tools/setup_venv.py run
	@exec $(BIN)/openlora up $(ARGS)

test: python  ## install with the test tools, then run the tests; ARGS="tests/engine -x"
	@$(PYTHON) tools/setup_venv.py test
	@exec $(BIN)/python -m pytest $(ARGS)

lint: python  ## ruff (lint and format) and mypy --strict
	@$(PYTHON) tools/setup_venv.py test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy tools

bench: python  ## benchmarks on this machine; ARGS="decode --device cpu --model demo"
	@$(PYTHON) tools/setup_venv.py test
	@exec $(BIN)/openlora bench $(ARGS)

clean:  ## remove .venv, caches and build output
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@command -v $(PYTHON) >/dev/null || { echo "make: Python 3.11 or later is needed and '$(PYTHON)' is not on PATH" >&2; exit 1; }

# Everything starts here: `make demo` runs the loop, `make test` checks it.
SHELL := /bin/bash
PYTHON := $(CURDIR)/.venv/bin/python
export PYTHON

.PHONY: setup demo test check bench generate format clean

setup: .venv/.ready

# uv takes its extra wheel folder from pip's configuration where there is one; elsewhere it picks
# the torch build that fits the machine.
.venv/.ready: pyproject.toml libs/leptonic/pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh

demo: setup
	@.venv/bin/leptonic demo

check: setup
	@scripts/check.sh

test: check
	@$(PYTHON) -m pytest

bench: setup
	@$(PYTHON) -m bench

generate: setup
	@scripts/generate.sh

format: setup
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

clean:
	rm -rf .venv .uv .leptonic .mypy_cache .ruff_cache .pytest_cache .hypothesis

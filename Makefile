# Everything starts here: `make demo` runs the loop, `make test` checks it.
SHELL := /bin/bash
PYTHON := $(CURDIR)/.venv/bin/python
export PYTHON

.PHONY: help setup demo test test-resilience test-long test-rolling test-crash soak test-compose chaos images-offline native native-sanitized check bench bench-peers bench-scheduler conformance generate format clean
.DEFAULT_GOAL := help
# Each has a target of its own.
SUITES := long or resilience or compose or chaos
# A test that hangs fails, and says where its threads stand.
BOUNDED := --timeout 300

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready ## install everything into .venv

# uv takes its extra wheel folder from pip's configuration where there is one; elsewhere it picks
# the torch build that fits the machine.
.venv/.ready: pyproject.toml libs/leptonic/pyproject.toml constraints.txt scripts/setup.sh $(wildcard native/*.*)
	@scripts/setup.sh

demo: setup ## run the whole loop once on real data
	@.venv/bin/leptonic demo

check: setup ## format, lint, types, import rules, style, documentation
	@scripts/check.sh

# Three files at a time on any machine, because most tests wait for a server or a process; then,
# one by one, those that start a whole stack or Ray.
test: check ## check, then every test
	@$(PYTHON) -m pytest $(BOUNDED) -n 3 --dist loadfile -m "not slow and not ($(SUITES))"
	@$(PYTHON) -m pytest $(BOUNDED) -m "slow and not ($(SUITES))"

test-resilience: setup ## services replaced under load, faults, an ended demo, a shared machine, two releases on one schema
	@$(PYTHON) -m pytest $(BOUNDED) -m "resilience and not compose"

test-long: setup ## minutes of training on real data: the articles' case
	@$(PYTHON) -m pytest -m "long and not compose" -s services libs

test-crash: setup ## the scheduler killed at 1,000 points of its writer, and its process 50 times
	@$(PYTHON) -m pytest -m long -s services/scheduler/tests/test_crash.py

soak: setup ## two million answers of one server over each front, its memory flat: SOAK_ANSWERS=2000000
	@$(PYTHON) -m pytest -m long -s tests/test_soak.py

test-compose: setup ## the loop, the demo and the faults in containers; starts a Docker engine where it can
	@scripts/test_compose.sh

native: setup ## the C++ front, the C++ pool and their wheels, with what they are compiled with
	@scripts/native.sh wheel

native-sanitized: setup ## the C++ front under sanitizers: mutated messages, broken HTTP/2, many threads
	@$(PYTHON) native/build.py sanitized

images-offline: ## stand-ins for the base images, where no image registry is reached
	@scripts/images_offline.sh

chaos: setup ## breaks everything in turn under load: KIND=embedded|compose SEED=1 ONLY=nats
	@$(PYTHON) -m pytest -m chaos -s tests/chaos

test-rolling: setup ## 50,000 requests while every service is replaced again and again
	@$(PYTHON) -m pytest -m "long and not compose" -s tests/test_rolling.py

bench: setup ## measurements, as ratios in one run
	@$(PYTHON) -m bench

bench-scheduler: setup ## the scheduler's figures beside anchors and targets: TRACE=openb|philly|FILE DATA=folder AGAIN=1
	@$(PYTHON) -m bench.scheduler $(if $(TRACE),--trace $(TRACE)) $(if $(DATA),--data $(DATA))

conformance: setup ## clients nobody here wrote: TRITON_EXAMPLES=a checkout of Triton's client repository
	@$(PYTHON) -m tests.conformance.run

bench-peers: setup ## the inference service and its peers: ONLY=triton-cpp,ours SECONDS=1 RUNS=5 MODELS=mlp AGAIN=1
	@ONLY=$(ONLY) SECONDS_EACH=$(SECONDS) RUNS=$(RUNS) MODELS=$(MODELS) AGAIN=$(AGAIN) $(PYTHON) -m bench.peers

generate: setup ## gRPC code from the protos
	@scripts/generate.sh

format: setup ## format the sources
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

clean: ## remove everything made here
	rm -rf .venv .uv .leptonic .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis

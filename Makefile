# `make` explains the targets, launch/install.sh VENV, PYTHON, TORCH and TORCH_PIP_ARGS.
VENV ?= .venv
export VENV
# Threads that wait asleep cost 10 % of speed on an idle machine and save a factor of 7 on a shared one.
export OMP_WAIT_POLICY ?= passive
python := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help env demo study test check fmt bench-data soak audit check-image clean

help: ## explain the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## make the Python environment, or bring it up to date
	@launch/install.sh

demo: env ## the whole loop in miniature: corpus, training, evaluation, loss curves, captions
	@$(python) -m launch.demo

study: env ## a scaling study in miniature, on the demo's corpus: 27 models, three laws, one report: 10 minutes
	@$(python) -m data.prepare.demo
	@$(python) -m launch.study study=mini

# Two files of tests at a time, because much of their time is waiting for processes and networks.
test: check ## formatting, lint, types, then every test
	OMP_NUM_THREADS=1 $(python) -m pytest -q -n 2 --dist loadfile --durations=10

check: env ## formatting, lint and types
	$(python) -m ruff format --check
	$(python) -m ruff check
	$(python) -m basedpyright --pythonpath $(python)

soak: env ## kill processes of a run 50 times at random moments; the log must not show it: 10 minutes or more
	$(python) -m tests.soak

audit: ## known vulnerabilities of the pinned packages; asks pypi.org, so CI leaves it out
	@launch/audit.sh

fmt: env ## format the code and apply the safe lint fixes
	$(python) -m ruff format
	$(python) -m ruff check --fix

bench-data: env ## the data pipeline against other loaders, each in an environment of its own under bench/
	@bench/install.sh
	$(python) -m bench.data

check-image: env ## the steps of the Dockerfile in a clean folder, with every package: minutes
	FULL_INSTALL=1 $(python) -m pytest -q --timeout=3000 tests/test_image.py

clean: ## delete the environment and the caches; runs/ and data/corpora/ stay
	rm -rf $(VENV) .venv-audit bench/.venv-* .pytest_cache .ruff_cache
	find . -path ./runs -prune -o -name __pycache__ -prune -exec rm -rf {} +

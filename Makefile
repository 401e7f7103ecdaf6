# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. Each makes .venv first if it is missing or out of date.
.DEFAULT_GOAL := help
.PHONY: help setup setup-deploy serve test test-fast test-deploy test-images test-clients tasks-env test-next wheel lint format bench lock clean

python := .venv/bin/python
# tests/helpers/scheduling.py says which worker gets which files
workers := -n 2 --dist loadfile --no-loadscope-reorder
PORT ?=
ARGS ?=

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup:  ## make .venv and install everything (VTPRUNE_BACKEND=cpu|cuda, VTPRUNE_PYTHON=...)
	@tools/setup.sh

serve: setup  ## serve the demo model (PORT=8000, ARGS="[MODEL] [any vLLM flag]")
	@exec .venv/bin/vtprune serve $(ARGS) $(if $(PORT),--port $(PORT))

test: lint  ## run the checks and all tests (ARGS="any pytest flag"; -n 0 for one process)
	@exec $(python) -m pytest $(workers) $(ARGS)

test-fast: setup  ## run the tests that start no engine
	@exec $(python) -m pytest -m "not engine and not browser" $(ARGS)

test-next: setup  ## run the tests that start no engine over vLLM 0.33's sources (fetches 340 MB once)
	@exec $(python) tools/next_vllm.py $(ARGS)

test-images: setup  ## build the container images and run them (root, buildah, debootstrap)
	@exec $(python) -m pytest tests/deploy/images.py $(ARGS)

tasks-env: setup  ## make the environment of `vtprune eval --tasks` (lmms-eval, some GB)
	@exec $(python) tools/tasks_env.py

test-clients: setup  ## run docs/clients.md in environments of its own (ARGS="-k litellm")
	@exec $(python) -m pytest tests/clients/environments.py $(ARGS)

setup-deploy: setup  ## make .venv-deploy: .venv and Ray Serve over it
	@$(python) tools/setup_deploy.py

test-deploy: setup-deploy  ## run the tests of deploy/ (ARGS="any pytest flag"); deploy/README.md has what they use
	@exec .venv-deploy/bin/python -m pytest tests/deploy $(workers) $(ARGS)

wheel: setup  ## build dist/vtprune-*.whl
	$(python) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

lint: setup  ## run ruff and mypy
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: setup  ## let ruff format the code and fix what it can
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

bench: setup  ## measure this machine (ARGS="any flag of benchmarks")
	@exec $(python) -m benchmarks $(ARGS)

lock: setup  ## rewrite requirements/cpu.lock and test.lock from what is installed in .venv
	@$(python) tools/lock.py

clean:  ## remove .venv, caches and builds
	rm -rf .venv .venv-deploy build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

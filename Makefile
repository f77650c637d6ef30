# Everything runs in .venv, which the first target that needs it creates.
#   PYTHON       the interpreter that .venv is made from (3.11 or newer)
#   ACCELERATOR  cpu, tpu or cuda: which jax is installed
#   SEED         the seed of the quickstart
#   WORKERS      processes that share the tests, about 4 GB each

PYTHON ?= python3
ACCELERATOR ?= cpu
SEED ?=
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
RUNTIME := $(VENV)/.installed-$(ACCELERATOR)
TEST := $(VENV)/.installed-test-$(ACCELERATOR)
# By files: the tests of one share runs that take minutes.
SHARED := --numprocesses=$(WORKERS) --dist=loadfile
EXTRA_cpu :=
EXTRA_tpu := --extra tpu
EXTRA_cuda := --extra cuda

ifeq ($(filter $(ACCELERATOR),cpu tpu cuda),)
$(error ACCELERATOR=$(ACCELERATOR) is not known: use cpu, tpu or cuda)
endif

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-fast test-accelerator lint format types docs requirements benchmark-peers clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(RUNTIME) ## install the package and its pinned requirements in .venv

quickstart: $(RUNTIME) ## warm-up, FlowRL and GRPO on Countdown, then runs/quickstart/report.html
	$(RUN) -m flowrl_jax.quickstart --config=configs/quickstart.py --workdir=runs/quickstart $(if $(SEED),--config.seed=$(SEED))

test: $(TEST) ## all tests
	$(RUN) -m pytest $(SHARED)

test-fast: $(TEST) ## the quick tests, in under three minutes
	$(RUN) -m pytest $(SHARED) -m "not slow"

test-accelerator: $(TEST) ## the tests that need the GPU or TPU named by ACCELERATOR
	FLOWRL_TEST_PLATFORM=$(ACCELERATOR) $(RUN) -m pytest -m accelerator

lint: $(TEST) ## ruff: rules and format; shellcheck
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(VENV)/bin/shellcheck launch/*.sh launch/*/*.sh launch/slurm/train.sbatch

format: $(TEST) ## ruff: mend what it can
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

types: $(TEST) ## pyright
	$(RUN) -m pyright

docs: $(RUNTIME) ## the pages of docs/ as a web site in site/
	$(RUN) scripts/bootstrap.py $(VENV) --requirements requirements.txt --extra docs
	$(RUN) -m mkdocs build --quiet

requirements: $(RUNTIME) ## pin requirements.txt and requirements-test.txt anew from pyproject.toml
	$(RUN) -m pip install -q uv
	UV_CUSTOM_COMPILE_COMMAND="make requirements" $(RUN) -m uv pip compile -q --no-annotate \
	  --upgrade --python-version 3.11 -o requirements.txt pyproject.toml
	UV_CUSTOM_COMPILE_COMMAND="make requirements" $(RUN) -m uv pip compile -q --no-annotate \
	  --upgrade --python-version 3.11 -c requirements.txt --extra test -o requirements-test.txt pyproject.toml

benchmark-peers: ## the stack that benchmarks/ compares with, in .venv-peers
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q google-tunix==0.1.7

clean: ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .ruff_cache site
	find . -name __pycache__ -prune -exec rm -rf {} +

CHECK_PYTHON = @$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("flowrl_jax needs Python 3.11 or newer and $(PYTHON) is %d.%d: name a newer one, as in make PYTHON=python3.12" % v)'

$(RUNTIME): requirements.txt
	$(CHECK_PYTHON)
	$(PYTHON) scripts/bootstrap.py $(VENV) --requirements requirements.txt $(EXTRA_$(ACCELERATOR))
	@touch $@

$(TEST): requirements-test.txt requirements-parity.txt requirements.txt
	$(CHECK_PYTHON)
	$(PYTHON) scripts/bootstrap.py $(VENV) --requirements requirements-test.txt \
	  --optional requirements-parity.txt $(EXTRA_$(ACCELERATOR))
	@touch $(RUNTIME) $@

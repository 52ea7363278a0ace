# `make help` lists the targets. Each makes .venv when it is missing or older than pyproject.toml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCK := requirements/lock.txt
OLDEST := requirements/oldest.txt
TORCH := $(shell grep -m 1 '^torch==' $(LOCK))
PYTEST_ARGS ?=
WORKERS ?= auto
KILLS ?= 1000
REQUESTS ?= 2000
SECONDS ?= 300
SEED ?= 0
FUZZ_SECONDS ?= 60
# Written by typer itself from the app, so that the page cannot say what the command does not do.
CLI_PAGE := $(BIN)/python -m typer randbasis.cli utils docs --name randbasis --title "The command"

.DEFAULT_GOAL := help
.PHONY: help install lock demo first-hour test test-newest test-oldest check bench bench-gpu bench-serving conformance studies study-beyond study-budgets study-fewshot study-full_rank study-generation study-glue study-laws study-pranc study-precision study-rank study-rates study-shared sweep-defaults rounded-sums fuzz mutants crash soak test-page page-picture docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED) ## make .venv with everything that tests, docs and demo need, at the versions of requirements/lock.txt

# $(call environment,FOLDER,OPTIONS): torch first and alone, since the rest must not pick another build of it, with what
# builds this package, so that pip does not fetch a builder that nobody tested.
define environment
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet $(2) "$(TORCH)" hatchling editables
	$(1)/bin/pip install --quiet $(2) --no-build-isolation "$(TORCH)" -e ".[dev]"
endef

$(INSTALLED): pyproject.toml $(LOCK)
	$(call environment,$(VENV),--constraint $(LOCK))
	touch $@

# uv comes from the lock that it is about to replace; the tests review what it wrote.
lock: ## resolve what `make install` and `make test-oldest` install anew (requirements/README.md), and show what changed
	test -x .cache/lock/bin/python || $(PYTHON) -m venv .cache/lock
	.cache/lock/bin/pip install --quiet --constraint $(LOCK) uv
	.cache/lock/bin/python requirements/make_lock.py

demo: $(INSTALLED) ## fine-tune a real encoder on real text, offline, and compare (writes demo-output/)
	$(BIN)/python examples/demo.py --output demo-output $(ARGS)

first-hour: $(INSTALLED) ## what a new user does in the first hour, in a shell, from a copy of the clone: every command is checked (.cache/first-hour)
	test -d $(RANDBASIS_DATA) && export RANDBASIS_DATA=$(abspath $(RANDBASIS_DATA)); $(BIN)/python tests/first_hour/run.py $(ARGS)

check: $(INSTALLED) ## ruff, pyright (strict on src), and whether docs/cli.md is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	@$(CLI_PAGE) --output $(VENV)/cli.md > $(VENV)/cli.log
	@diff docs/cli.md $(VENV)/cli.md || { echo "docs/cli.md is stale: run 'make docs' and commit it"; exit 1; }

# One thread a worker: pytest-xdist already keeps every core busy.
test: check ## check, then the test suite (PYTEST_ARGS="-k nola" picks tests)
	RANDBASIS_PINS=$(LOCK) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)
	@echo "make test: lint, format, types, docs/cli.md and the test suite passed"

# torch stays: another release would pull gigabytes of CUDA packages. It says so, and what else it installed.
test-newest: ## the test suite on the newest of everything that the ranges of pyproject.toml allow, torch excepted
	$(call environment,.venv-newest,--upgrade --upgrade-strategy eager)
	@echo "make test-newest: $(TORCH) as locked, since another torch pulls gigabytes of CUDA packages; the rest at its newest"
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-oldest: ## the test suite on the oldest of what the ranges allow (requirements/oldest.txt), torch excepted
	$(call environment,.venv-oldest,--constraint $(OLDEST))
	@echo "make test-oldest: $(TORCH) as locked, since another torch pulls gigabytes of CUDA packages; the rest at its oldest"
	RANDBASIS_PINS=$(OLDEST) OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# The page is made from what was measured, also when a case failed; the exit code is that of the run.
bench: $(INSTALLED) ## check, then time every case (ARGS="--only step --tokens 2048 --rounds 7 --threads 4"); writes the tables in docs/
	$(BIN)/python -m benchmarks run $(ARGS); code=$$?; $(BIN)/python -m benchmarks report && exit $$code

bench-serving: $(INSTALLED) ## the bank: mixed batches beside PEFT's adapter_names, loading, memory of up to 100,000 adapters
	$(BIN)/python -m benchmarks run --only bank "bank load" "bank cold" "bank memory" serving $(ARGS); code=$$?; $(BIN)/python -m benchmarks report && exit $$code

# Nine minutes are left for all: no case begins after eight, and the next run goes on where this one stopped.
bench-gpu: $(INSTALLED) ## the same for the cases that need a CUDA device, and one table of targets (ARGS="--only step decode" picks parts)
	$(BIN)/python -m benchmarks run --device cuda --within 480 $(ARGS); code=$$?; $(BIN)/python -m benchmarks report; \
	$(BIN)/python -m benchmarks targets --device cuda; exit $$code

conformance: $(INSTALLED) ## PEFT's own tests on our configurations (ARGS="--method nola", "--quick")
	$(BIN)/python tests/conformance/run_peft_tests.py $(ARGS)

# The folder of data sets and models that the studies read.
RANDBASIS_DATA ?= ../shared/data

STUDIES := study-beyond study-budgets study-fewshot study-full_rank study-generation study-glue study-laws study-pranc study-precision study-rank study-shared

studies: $(STUDIES) ## all studies of methods on real data (RANDBASIS_DATA) and their reports in docs/results/; study-glue, study-rank, … make one

# A study is about an hour on two cores; what has run is kept, so it may be stopped (ARGS="--seconds 500 --cores 2").
$(STUDIES): study-%: studies/%.toml $(INSTALLED)
	$(BIN)/randbasis compare $< --data $(RANDBASIS_DATA) --output docs/results/$* $(ARGS)

study-rates: $(INSTALLED) ## docs/results/rates.md: where one learning rate carries over, from the trials of the studies that have run
	$(BIN)/python -m studies rates

sweep-defaults: $(INSTALLED) ## the missing runs of the sweep that default learning rates are chosen from (hours; may be stopped), and docs/defaults.md
	OMP_NUM_THREADS=1 $(BIN)/python -m studies sweep --data $(RANDBASIS_DATA) $(ARGS)
	$(BIN)/python -m studies defaults

rounded-sums: $(INSTALLED) ## the missing runs that fuse_rounding is judged by (half an hour; may be stopped), and docs/rounding.md
	OMP_NUM_THREADS=1 $(BIN)/python -m studies rounding --data $(RANDBASIS_DATA) $(ARGS)

mutants: $(INSTALLED) ## small faults in modules that hold promises: each must fail a test (ARGS="--module tuner/targets.py --each 10 --seed 1")
	$(BIN)/python tests/mutants/run_mutants.py $(ARGS)

crash: $(INSTALLED) ## kill a writer of a store at random moments and compare what is left; a row in benchmarks/results/crash.csv (KILLS=1000, SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.crash --kills $(KILLS) --seed $(SEED)

soak: $(INSTALLED) ## a server under load and faults, each answer compared with its adapter's alone; a row in benchmarks/results/soak.csv (REQUESTS=2000, SECONDS=300, SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --requests $(REQUESTS) --seconds $(SECONDS) --seed $(SEED); code=$$?; $(BIN)/python -m benchmarks report && exit $$code

# Debian's packages; where apt may not, the tests say what they miss.
test-page: $(INSTALLED) ## the server's page and the site in a headless Chromium, which apt installs where it may
	command -v chromedriver > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serve/test_page_in_chromium.py tests/test_site.py $(PYTEST_ARGS)

page-picture: $(INSTALLED) ## docs/images/serving-page.png: two adapters trained on real data, and the page that asks them (needs what test-page installs)
	PYTHONPATH=tests/support $(BIN)/python tests/serve/page_picture.py --data $(RANDBASIS_DATA)

fuzz: $(INSTALLED) ## feed the reader of packed files what coverage suggests (FUZZ_SECONDS=60; corpus in .cache/fuzz)
	$(BIN)/python tests/adapter_file/fuzz_reader.py .cache/fuzz -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1

# The theme warns of a mkdocs that the ranges do not allow.
docs: $(INSTALLED) ## write docs/cli.md and docs/host-names.md from the code, and build the site into site/ (docs/, mkdocs.yml)
	$(CLI_PAGE) --output docs/cli.md
	$(BIN)/python docs/host_names.py > docs/host-names.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "make docs: wrote docs/cli.md and site/index.html"

clean: ## remove .venv, caches and built pages
	rm -rf $(VENV) .venv-newest .venv-oldest .cache/lock site build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# `make help` lists the targets. Each makes .venv when it is missing or older than pyproject.toml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?=
WORKERS ?= auto
KILLS ?= 1000
SEED ?= 0
FUZZ_SECONDS ?= 60
# Written by typer itself from the app, so that the page cannot say what the command does not do.
CLI_PAGE := $(BIN)/python -m typer randbasis.cli utils docs --name randbasis --title "The command"

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench bench-gpu conformance results results-sst2 results-vision results-e2e results-quantization fuzz crash docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED) ## make .venv with everything that tests, docs and demo need

# torch first and alone: the rest must not pick another build of it.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

demo: $(INSTALLED) ## fine-tune a real encoder on real text, offline, and compare (writes demo-output/)
	$(BIN)/python examples/demo.py --output demo-output $(ARGS)

check: $(INSTALLED) ## ruff, pyright (strict on src), and whether docs/cli.md is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	@$(CLI_PAGE) --output $(VENV)/cli.md > $(VENV)/cli.log
	@diff docs/cli.md $(VENV)/cli.md || { echo "docs/cli.md is stale: run 'make docs' and commit it"; exit 1; }

# One thread a worker: pytest-xdist already keeps every core busy.
test: check ## check, then the test suite (PYTEST_ARGS="-k nola" picks tests)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)
	@echo "make test: lint, format, types, docs/cli.md and the test suite passed"

# The page is made from what was measured, also when a case failed; the exit code is that of the run.
bench: $(INSTALLED) ## check, then time every case (ARGS="--only step --tokens 2048 --rounds 7 --threads 4"); writes the tables in docs/
	$(BIN)/python -m benchmarks run $(ARGS); code=$$?; $(BIN)/python -m benchmarks report && exit $$code

bench-gpu: $(INSTALLED) ## the same for the cases that need a CUDA device
	$(BIN)/python -m benchmarks run --device cuda $(ARGS); code=$$?; $(BIN)/python -m benchmarks report && exit $$code

conformance: $(INSTALLED) ## PEFT's own tests on our configurations (ARGS="--method nola", "--quick")
	$(BIN)/python tests/conformance/run_peft_tests.py $(ARGS)

# The folder of data sets and models that the studies read.
RANDBASIS_DATA ?= ../shared/data

results: $(INSTALLED) ## docs/results.md from the raw rows; results-sst2, -vision, -e2e, -quantization make the missing rows first
	$(BIN)/python -m randbasis.compare report

results-sst2 results-vision results-e2e results-quantization: results-%: $(INSTALLED)
	$(BIN)/python -m randbasis.compare run $* --data $(RANDBASIS_DATA)
	$(BIN)/python -m randbasis.compare report

crash: $(INSTALLED) ## kill a writer of a store at random moments and compare what is left; a row in benchmarks/results/crash.csv (KILLS=1000, SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.crash --kills $(KILLS) --seed $(SEED)

fuzz: $(INSTALLED) ## feed the reader of packed files what coverage suggests (FUZZ_SECONDS=60; corpus in .cache/fuzz)
	$(BIN)/python tests/adapter_file/fuzz_reader.py .cache/fuzz -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1

docs: $(INSTALLED) ## write docs/cli.md from the command's help, and build the site into site/
	$(CLI_PAGE) --output docs/cli.md
	$(BIN)/mkdocs build --strict --quiet
	@echo "make docs: wrote docs/cli.md and site/index.html"

clean: ## remove .venv, caches and built pages
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

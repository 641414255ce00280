# Each target sets up what it needs from a bare checkout; `make help` lists them.
# Prerequisites: make and python3-venv (tools/bootstrap.sh says what is missing).

PYTHON_ENV := .venv/bin
# A stamp a place: in a moved or copied checkout the environment is made anew.
PLACE := $(shell pwd | cksum | cut -d' ' -f1)
DEMO_STAMP := .venv/.demo-$(PLACE)
DEV_STAMP := .venv/.dev-$(PLACE)

ARGS ?=
# Folders or files to test; a run of all of them also checks coverage and counts.
TESTS ?=
# Processes that test at the same time.
WORKERS ?= 2
# What the debug lane runs: everything that a loop drives.
DEBUG_TESTS ?= tests/aio tests/twins tests/testing tests/discovery tests/fabric \
    tests/integration
# Tests that would only be slower under coverage and in debug mode.
HARD := exhaustive or simulate or soak or fuzz or load or lab or lab_long
# Of how many parts of the tests one is run in debug mode; 1 is all of them.
PART ?= 1
# Another order of sets and dictionaries each time; the command line shows it.
HASH_SEED ?= $(shell shuf -i 1-4294967295 -n 1)

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-debug test-hard test-quick test-long simulate soak \
    fuzz lab lab-long lab-shell lint format docs bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(DEMO_STAMP)  ## real files between two processes, over SMC-R and over TCP
	$(PYTHON_ENV)/pysmc demo $(ARGS)

test: lint  ## style, types, import rules; all tests, a fifth also in debug mode
	@$(MAKE) --no-print-directory test-debug PART=5
	@$(MAKE) --no-print-directory test-hard
	@$(MAKE) --no-print-directory test-full
	@# Where it cannot run it says so; PYSMC_LAB=require makes that an error.
	@$(MAKE) --no-print-directory lab

test-full: $(DEV_STAMP)  ## all tests but those of test-hard; coverage and counts
	$(PYTHON_ENV)/python -m pytest --full -n $(WORKERS) -m "not long and not ($(HARD))" \
	    --cov --cov-report=json $(ARGS)

test-debug: $(DEV_STAMP)  ## what a loop drives, in the debug modes of Python and asyncio
	PYTHONASYNCIODEBUG=1 PYTHONHASHSEED=$(HASH_SEED) \
	    $(PYTHON_ENV)/python -X dev -W error -m pytest -q -n $(WORKERS) \
	    -m "not long and not ($(HARD))" --part $(PART) \
	    $(DEBUG_TESTS) $(ARGS)

test-hard: $(DEV_STAMP)  ## load, simulation, hostile peers and fuzzing, in small numbers
	$(PYTHON_ENV)/python -m pytest -q --lane hard -n $(WORKERS) --maxschedchunk 1 \
	    -m "$(HARD)" --ignore tests/load --ignore tests/lab \
	    $(ARGS)
	@# These measure times: nothing else runs beside them.
	$(PYTHON_ENV)/python -m pytest -q --lane load $(ARGS) tests/load

test-quick: $(DEV_STAMP)  ## tests without lint, coverage and counts (TESTS=tests/core)
	$(PYTHON_ENV)/python -m pytest -m "not slow and not long" $(TESTS) $(ARGS)

test-long: $(DEV_STAMP)  ## only the tests that take minutes
	$(PYTHON_ENV)/python -m pytest -m long $(TESTS) $(ARGS)

simulate: $(DEV_STAMP)  ## a million seeds, every single fault (SEED=n: one, with its trace)
ifdef SEED
	$(PYTHON_ENV)/python -m pysmc.testing.simulation --seed $(SEED) --trace $(ARGS)
else
	$(PYTHON_ENV)/python -m pytest --long -n $(WORKERS) -m simulate $(ARGS)
endif

soak: $(DEV_STAMP)  ## hours of simulated time, thousands of hostile peers, 64 GiB
	$(PYTHON_ENV)/python -m pytest --long -s -m soak $(ARGS)

fuzz: $(DEV_STAMP)  ## ten million inputs for a decoder, one for the slower targets
	$(PYTHON_ENV)/python -m pytest --long -n $(WORKERS) -m fuzz $(ARGS)

lab: $(DEV_STAMP)  ## a guest with soft-RoCE: the scenarios of every run (docs/howto/lab.md)
	$(PYTHON_ENV)/python -m pytest -q -m "lab and not (long or lab_long)" \
	    $(if $(filter require,$(PYSMC_LAB)),--lane lab) $(ARGS) tests/lab

lab-long: $(DEV_STAMP)  ## the scenarios that take minutes
	$(PYTHON_ENV)/python -m pytest -v -s -m "lab_long or (lab and long)" \
	    --lab-report $(ARGS) tests/lab

lab-shell: $(DEV_STAMP)  ## a shell in the guest
	$(PYTHON_ENV)/python tools/run_lab.py shell

lint: $(DEV_STAMP)  ## ruff, mypy, import-linter
	$(PYTHON_ENV)/ruff check .
	$(PYTHON_ENV)/ruff format --check .
	$(PYTHON_ENV)/mypy
	$(PYTHON_ENV)/lint-imports --no-cache --no-logo

format: $(DEV_STAMP)  ## let ruff put the code in order
	$(PYTHON_ENV)/ruff check --fix .
	$(PYTHON_ENV)/ruff format .

docs: $(DEV_STAMP)  ## write the tables of the docs from the code
	$(PYTHON_ENV)/python tools/doc_tables.py

bench: $(DEV_STAMP)  ## shm against asyncio TCP and uvloop TCP on loopback
	$(PYTHON_ENV)/pysmc bench $(ARGS)

clean:  ## remove the environment and what tools and tests left
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache .coverage .coverage.* coverage.json htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_STAMP): pyproject.toml tools/bootstrap.sh
	@tools/bootstrap.sh demo
	@touch $@

$(DEV_STAMP): pyproject.toml tools/bootstrap.sh
	@tools/bootstrap.sh dev
	@touch $@

# `make help` lists what there is. Needs make and Python 3.11 or newer; everything else goes into .venv, once.

# The first of these that runs and is new enough makes .venv.
PYTHON ?= python3.13 python3.12 python3.11 python3
DEMO ?= fedbilevel compare hyper-representation --dataset digits --partition shards --clients 20 \
	--algorithms aggitd,fednest --seeds 3 --rounds 200 --overwrite --out demo
BENCHMARKS ?= $(filter-out benchmarks/fednest_settings.py benchmarks/no_knobs.py benchmarks/torch_rounds.py, $(wildcard benchmarks/*.py))
# More words for pytest, as in: make test ARGS="-k aggitd"
ARGS ?=

GOALS := help demo test test-slow test-network test-torch lint types docs bench clean
.PHONY: $(GOALS)
.DEFAULT_GOAL := help

ifneq ($(strip $(MAKEFILE_LIST)),Makefile)

# Called from another folder, as in `make -f ../Makefile test`: go to this file's own folder first. All paths below are
# relative to it, so that it may have spaces in its name.
HERE := $(shell file='$(MAKEFILE_LIST)'; dirname "$${file# }")

$(GOALS):
	@$(MAKE) --no-print-directory -C "$(HERE)" $@

else

.NOTPARALLEL:
unexport PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet

# What the tests compile is kept: a second run starts with it. FASTER makes it cheaper to compile many small programs,
# which takes half of the time; FASTER= on the command line compiles them as users do. A worker that dies ends the run:
# started again, it may leave the other waiting for ever. Whoever is done takes tests from the end of what the other has.
TESTS := JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.venv/xla" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	$(BIN)/python -m pytest -n 2 --dist worksteal --max-worker-restart 0
FASTER := --xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false \
	--xla_cpu_parallel_codegen_split_count=1
# No line numbers in compiled programs, and no memory given back to the system: both are a tenth of the time.
LIGHTER := JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=134217728
CHEAPER = XLA_FLAGS="$(strip $(FASTER) $$XLA_FLAGS)" $(LIGHTER)

help: ## this list
	@awk -F ' *## ' '/^[a-z-]+:.*##/ { sub(/:.*/, "", $$1); printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/core ## AggITD against FedNest on handwritten digits, three seeds: tables and figures in demo/
	$(BIN)/$(DEMO)

test: .venv/core .venv/test ## the tests, but for the slow ones
	$(CHEAPER) $(TESTS) -m "not slow and not network and not torch" $(ARGS)

test-slow: .venv/core .venv/test .venv/docs .venv/dev ## the slow tests
	$(CHEAPER) $(TESTS) -m "slow and not network and not torch" $(ARGS)

test-network: .venv/core .venv/test ## the tests of a provisioned deployment on this machine
	$(CHEAPER) $(subst .venv/xla,.venv/xla-network,$(TESTS)) -n 0 -m network $(ARGS)

test-torch: .venv/core .venv/test .venv/torch ## the tests that need PyTorch, which it installs; test-network has more
	$(CHEAPER) $(TESTS) -m "torch and not network" $(ARGS)

lint: .venv/dev ## ruff: the rules and the format; the contract of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=src:studies/src $(BIN)/lint-imports --no-cache

types: .venv/core .venv/test .venv/torch .venv/dev ## pyright
	$(BIN)/pyright

docs: .venv/core .venv/docs ## the documentation, as pages in site/
	$(BIN)/mkdocs build --strict

bench: .venv/core .venv/test ## the benchmarks
	@for file in $(BENCHMARKS); do echo "$$file"; $(BIN)/python "$$file" || exit 1; done

clean: ## remove what was built and kept, but for .venv
	rm -rf demo site dist build studies/dist studies/build .pytest_cache .ruff_cache .hypothesis .venv/xla .venv/xla-network
	find src studies tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv: one stamp for the environment, one for the two packages, one for each dependency group. They are renewed
# when a pyproject.toml is newer; else nothing is asked of any network.

.venv/made:
	@found=; for python in $(PYTHON); do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
		then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "None of $(PYTHON) is a Python 3.11 or newer with venv and ensurepip: install one (on Debian, python3-venv" \
			"too), or name it, as in: make demo PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "Making .venv with $$($$found --version)"; $$found -m venv .venv
	@$(PIP) --upgrade "pip>=25.1"  # the first that installs dependency groups
	@touch $@

.venv/core: .venv/made pyproject.toml studies/pyproject.toml
	@echo "Installing fedbilevel, its studies and what they need into .venv: about a minute, this once"
	@$(PIP) --editable . --editable studies
	@touch $@

.venv/test .venv/torch .venv/docs .venv/dev: .venv/%: .venv/made pyproject.toml
	@echo "Installing the $* tools into .venv, this once"
	@$(PIP) --group $*
	@touch $@

endif

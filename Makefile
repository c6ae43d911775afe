# make run · tables · test · lift FROM=02 NAME=function · numbers · differences · combine · notebooks · lab · bench · bugs
#      robustness · pictures · lint · style · shared · grade NOTEBOOK=mine.ipynb · handout TO=folder
#      project PROJECT=1 FILE=mine.py
#      book · test-book · browser
#
#   CHAPTER=2      only that chapter            ARGS="--steps 5"     flags for the scripts, pytest or the benchmarks
#   PY=python3     that interpreter as it is, instead of .venv, which is built when it is missing
#   PROCESSES=4    that many share the tests, a file each at a time (2); needs pytest-xdist

# CHAPTER may be 2, 02 or 02_megatron_tp; NUMBER is 02, or what matches every chapter.
FIRST   := $(firstword $(subst _, ,$(CHAPTER)))
NUMBER  := $(or $(patsubst %,0%,$(filter 0 1 2 3 4 5 6 7 8 9,$(FIRST))),$(FIRST),[0-9][0-9])
ONLY    := $(if $(CHAPTER),--chapter $(NUMBER))

# A chapter is NN_name/name.py; its folder may hold tools and name_tables.py as well.
name_of  = $(patsubst $(firstword $(subst _, ,$1))_%,%,$1)
CHOSEN  := $(patsubst %/,%,$(sort $(wildcard $(NUMBER)_*/)))
SCRIPTS := $(wildcard $(foreach folder,$(CHOSEN),$(folder)/$(call name_of,$(folder)).py))
TABLES  := $(sort $(wildcard $(NUMBER)_*/*_tables.py))
TESTS   := $(sort $(wildcard tests/test_$(NUMBER)_*.py))
BENCHES := $(sort $(wildcard tests/bench/$(NUMBER)_*.py))
DRAWERS := $(sort $(wildcard tests/pictures/$(NUMBER)_*.py))
FOLDERS := $(subst $() ,:,tests $(patsubst %/,%,$(sort $(dir $(wildcard [0-9][0-9]_*/*.py)))))

# Most tests leave a core idle. Files that take long come first, so that both processes end together.
PROCESSES ?= 2
HAS_XDIST = $(shell $(PY) -c "import xdist" 2> /dev/null && echo yes)
SHARED    = $(if $(HAS_XDIST),--numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder)

ifeq ($(origin PY),undefined)
PY  := .venv/bin/python
RUN := .venv/.installed-run
DEV := .venv/.installed-dev
WEB := .venv/.installed-book
endif

.PHONY: run tables test lift numbers differences combine notebooks lab grade project handout bench bugs robustness pictures lint style shared
.PHONY: book test-book browser

run: $(RUN)
	@$(if $(SCRIPTS),,echo "no chapter $(CHAPTER)"; exit 1;)
	@set -e; for script in $(SCRIPTS); do echo "── $$script"; $(PY) $$script $(ARGS); echo; done

tables: $(RUN)
	@$(if $(TABLES),,echo "no tables of $(if $(CHAPTER),chapter $(CHAPTER),any chapter)"; $(if $(CHAPTER),exit 1;))
	@set -e; for script in $(TABLES); do echo "── $$script"; $(PY) $$script $(ARGS); echo; done

# Hundreds of processes would each compile the chapters.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(DEV) lint
	@$(if $(TESTS),,echo "no tests of chapter $(CHAPTER)"; exit 1;)
	$(PY) -m pytest $(SHARED) $(if $(CHAPTER),,tests/book) $(TESTS) $(ARGS)

bugs: $(DEV)
	@$(if $(TESTS),,echo "no tests of chapter $(CHAPTER)"; exit 1;)
	$(PY) -m pytest -m planted_bug $(TESTS) $(ARGS)

lift: $(DEV)
	@$(PY) tests/book/lift.py "$(FROM)" "$(NAME)" $(if $(TO),--to "$(TO)")

robustness: $(DEV)
	PYTHONPATH=tests $(PY) tests/book/robustness.py $(ONLY) $(ARGS)

bench: $(DEV)
	@$(if $(BENCHES),,echo "no benchmark of chapter $(CHAPTER)"; exit 1;)
	@set -e; for script in $(BENCHES); do echo "── $$script"; PYTHONPATH=$(FOLDERS) $(PY) $$script $(ARGS); done

differences: $(DEV)
	$(PY) tests/book/measure_differences.py

combine: $(DEV)
	$(PY) tests/book/measure_combine.py

pictures: $(DEV)
	@$(if $(DRAWERS),,echo "no picture of chapter $(CHAPTER)"; exit 1;)
	@set -e; for script in $(DRAWERS); do echo "── $$script"; PYTHONPATH=$(FOLDERS) $(PY) $$script; done

# An interpreter that PY names may have no ruff: one line says so. In .venv and in CI that is an error.
lint: $(DEV)
	@if [ -z "$(DEV)$(CI)" ] && ! $(PY) -m ruff --version > /dev/null 2>&1; then \
		echo "lint: $(PY) has no ruff, so the style is not checked (pip install ruff)"; \
	else \
		$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .; \
	fi

style: $(DEV)
	$(PY) tests/book/style.py $(if $(CHAPTER),$(SCRIPTS)) $(ARGS)

numbers: $(DEV)
	$(PY) tests/book/front_door.py $(ONLY) $(ARGS)

notebooks: $(DEV)
	$(PY) tests/book/notebooks.py $(ONLY) $(if $(SAVE),--save)

lab: $(DEV)
	$(PY) -m jupyterlab notebooks $(ARGS)

grade: $(DEV)
	$(PY) tests/book/grade.py "$(NOTEBOOK)" $(ARGS)

project: $(DEV)
	$(PY) tests/book/projects.py "$(PROJECT)" "$(FILE)" $(ARGS)

handout: $(DEV)
	$(PY) tests/book/handout.py $(ONLY) $(if $(TO),--to "$(TO)")

shared: $(DEV)
	$(PY) tests/book/shared_blocks.py

# The book as a static site, in build/book/html.
book: $(WEB)
	@PYTHONPATH=tests/book $(PY) -m web.build

test-book: book
	$(PY) -m pytest -rs tests/book/web/check_pages.py tests/book/web/check_browser.py $(ARGS)

# A headless Chromium for test-book: one that is there, the system's package, or playwright's own.
browser: $(WEB)
	@for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do \
		command -v $$name && exit 0; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -q && apt-get install -qy chromium && exit 0; \
	fi; \
	$(PY) -m playwright install chromium

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

.venv/.installed-book: .venv/.installed-dev
	@echo "installing what the site needs into .venv; this happens once"
	.venv/bin/python -m pip install --quiet --editable '.[dev,book]'
	@touch $@

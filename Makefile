# The two commands are `make course` and `make test`. The first run makes an environment in .venv; after that no network is needed.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
COURSE := $(VENV)/bin/python -m course
# As in course/__init__.py, which says why.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE}
PYTEST := $(ONE_THREAD) $(VENV)/bin/python -m pytest --durations=15

.DEFAULT_GOAL := help
.PHONY: help setup course lab test test-gpu test-site lint site slides build doctor demo clean

help:
	@echo "make course    set up, run every notebook, make the pages"
	@echo "make lab       set up, open JupyterLab at the first notebook"
	@echo "make test      set up, run the tests"
	@echo "make doctor    what this machine can do, and how to mend what is missing"
	@echo "make demo      the course in under a minute"
	@echo "make site      pages from the saved outputs, without running anything"
	@echo "make slides    the decks for a talk, from slides/"
	@echo "make test-gpu  the tests that need a GPU"
	@echo "make test-site every page of the site, in every way, in a browser"
	@echo "make build     for authors: exercises from solutions, claimed numbers into pages"
	@echo "make clean     remove pages and caches; your work and .venv stay"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$($(PYTHON) --version 2>&1) is too old: the course needs Python 3.11 or newer. Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "This Python has no venv. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@echo "Setting up in $(VENV): torch and some hundred other packages come in; minutes, the first time only."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@
	@echo "Set up. For the course command itself: source $(VENV)/bin/activate"

course: $(INSTALLED)
	$(COURSE) run

# lessons open as they read, not as their source
lab: $(INSTALLED)
	JUPYTER_CONFIG_PATH="$(CURDIR)/course/jupyter" $(ONE_THREAD) $(VENV)/bin/python -m jupyter lab --ServerApp.root_dir="$(CURDIR)" $(firstword $(wildcard notebooks/00_*.ipynb))

# two processes on two cores; a notebook stays whole in one of them
test: $(INSTALLED) lint
	$(PYTEST) -n auto --maxprocesses 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout 300 tests notebooks

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

test-gpu: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m gpu --durations=15 tests

site: $(INSTALLED)
	$(COURSE) site

slides: $(INSTALLED)
	$(COURSE) slides

# every page of the site, in both widths, by day and by night; make test looks at each in one of these
test-site: $(INSTALLED)
	COURSE_WHOLE_SITE=1 $(PYTEST) tests/test_website_course.py

build: $(INSTALLED)
	$(COURSE) build

doctor: $(INSTALLED)
	$(COURSE) doctor

demo: $(INSTALLED)
	$(COURSE) demo

clean:
	rm -rf site build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -not -path './$(VENV)/*' -prune -exec rm -rf {} +

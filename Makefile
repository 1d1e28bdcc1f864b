# make lab        open the course in JupyterLab       make test   prove everything (FAST=1: without notebooks
#                                                     and slow tests; ONLY=nbs/...ipynb: that and what imports it)
# make notebooks  run notebooks again, keep outputs   make sync   clean notebooks, export modules, make the README
# make docs       build the site (needs Quarto)       make clean  remove what these commands made
PYTHON ?= python3
VENV   := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
READY  := $(VENV)/ready
RUN    := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: lab test browser sync readme notebooks docs clean
.DEFAULT_GOAL := lab

# Made again only when what it installs has changed.
$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed; this is %d.%d. Try: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -e '.[dev,backbones]'
	touch $(READY)

lab: $(READY)
	$(RUN) jupyter lab nbs/index.ipynb

test: $(READY)
	$(RUN) python -m tests $(if $(FAST),--fast) $(ONLY)

# What the test in a real browser needs, besides a Chromium on the machine.
browser: $(VENV)/browser
$(VENV)/browser: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[browser]'
	touch $@

sync: $(READY)
	$(RUN) python -m tests.sync

readme: $(READY)
	$(RUN) python -m tests.readme

# make notebooks ONLY=nbs/1_autoencoders/11_ae.ipynb
notebooks: $(READY)
	$(RUN) python -m tests.execute $(ONLY)

docs: $(READY)
	@command -v quarto >/dev/null || { echo 'The site is built by Quarto, which is not on this machine. Get it from https://quarto.org/docs/get-started/ and run make docs again.'; exit 1; }
	rm -rf _proc
	@# nbdev would have Quarto write another README where it seems older than its notebook
	touch README.md
	$(RUN) nbdev_docs

clean:
	rm -rf $(VENV) _proc _docs build dist *.egg-info .pytest_cache .hypothesis
	find nbs ad_course tests -name __pycache__ -prune -exec rm -rf {} +

# make demo     train, certify and compare four classifiers of the embedded digits (a few minutes on 2 cores)
# make test     ruff, the type checker, the test suite
# make package  build the wheel, install it elsewhere on two versions of Python, run the commands (minutes)
# make browser  open the page of a report in Chromium, if it is installed
# make soak     full grids, long simulations, kill campaigns (an hour or two)
# make lint     ruff
# make docs     build the documentation into docs/_build/html; the tutorials run, and a warning is an error (minutes)
# All of them make their own environment in .venv first; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test package browser soak lint docs clean
.DELETE_ON_ERROR:

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; give make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

# Equal for all: images, loss, attack, steps, sigma, n and alpha. split4 is certified with samples and without.
demo: .venv/ready
	for variant in split4 split2 split4_input mlp_input; do \
	  $(BIN)/python -m lsrs_jax.train --config=configs/digits.py:$$variant --workdir=$(DEMO)/$$variant && \
	  $(BIN)/python -m lsrs_jax.certify --workdir=$(DEMO)/$$variant || exit 1; \
	done
	$(BIN)/python -m lsrs_jax.report 'margin behind 4 of 4 blocks'=$(DEMO)/split4/certify/default-margin \
	  'LSRS behind 4 of 4 blocks'=$(DEMO)/split4/certify/default 'LSRS behind 2 of 4 blocks'=$(DEMO)/split2 \
	  'ISRS of the same network'=$(DEMO)/split4_input/certify/default 'ISRS of an MLP'=$(DEMO)/mlp_input \
	  --cost --out=$(DEMO)/report

test: .venv/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

package: .venv/ready
	$(BIN)/python -m pytest -m package --timeout=1200

browser: .venv/ready
	$(BIN)/python -m pytest -m browser --timeout=600 -rs

soak: .venv/ready
	$(BIN)/python -m pytest -m soak --timeout=7200 -s

lint: .venv/ready
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,docs]'
	@touch $@

docs: .venv/docs-ready
	$(BIN)/python -m sphinx -b html -W --keep-going --jobs=auto --quiet docs docs/_build/html

clean:
	rm -rf .venv runs/demo docs/_build

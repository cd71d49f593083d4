# Everything runs in .venv, which the first target makes with pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-slow lint

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

# The main job: REINFORCE learns what to skip for each input, and is evaluated on the test split.
demo: install
	rm -rf runs/demo
	$(BIN)/sd-gym train SD/Classification-Mini-v0 --algo reinforce --steps 20000 --output runs/demo

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

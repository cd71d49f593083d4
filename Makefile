# Everything runs in .venv, which the first target makes with pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test coverage test-slow lint types arrows linked docs matrix

install: .venv/installed

.venv/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[test,lint,docs]"
	touch $@

# The main job: REINFORCE learns what to skip for each input, and is evaluated on the test split.
demo: install
	rm -rf runs/demo
	$(BIN)/sd-gym train SD/Classification-Mini-v0 --algo reinforce --steps 20000 --output runs/demo

# One process per core, of one thread each: the tests' models are too small for more. JOBS=1 to see prints.
JOBS ?= 2
test coverage test-slow: export OMP_NUM_THREADS := 1

test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# The same, a quarter slower, with the lines that no test runs.
coverage: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=term:skip-covered

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install types arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/basedpyright

# All packages as they are installed, as links.
linked:
	rm -rf build/arrows && mkdir -p build/arrows/sd_gym
	ln -s $(CURDIR)/sd_gym/* $(CURDIR)/agents $(CURDIR)/envs_configs build/arrows/sd_gym/

# The contracts in pyproject.toml.
arrows: install linked
	cd build/arrows && $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml --no-logo

# The site, in build/site; needs no network. A warning, such as about a broken link, is an error.
docs: install linked
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --strict

# The seams (switch, env shells, agents) under the oldest and newest allowed versions and each Python that is there.
matrix:
	.ci/matrix

# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check coverage docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/gfs demo

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

# Branches of gfs_core that its tests and those of the adapters take.
coverage: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n auto --dist loadfile tests/core tests/lightning tests/hf gfs_core
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

docs: $(VENV)/.installed
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) gfs-demo site .pytest_cache .mypy_cache .ruff_cache .coverage*

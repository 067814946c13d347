# Two commands for a newcomer: `make demo` and `make test`; two for a writer: `make notebooks` and `make docs`.
# Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test notebooks docs check clean

demo: .venv/installed
	$(BIN)/minicpgd demo

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile

notebooks: .venv/installed
	$(BIN)/python notebooks/build.py

docs: .venv/installed
	$(BIN)/python docs/build.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	@echo "setting up .venv, once: a few minutes of silence while packages are fetched"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

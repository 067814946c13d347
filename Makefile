# Two commands for a newcomer: `make demo` and `make test`; two for a writer: `make notebooks` and `make docs`; two for
# whoever doubts: `make faults` and `make mutants`. Each sets up .venv by itself. `make test-verl` runs our losses inside
# verl, which wants an older transformers and so gets a .venv-verl of its own.
PYTHON ?= python3
BIN := .venv/bin
CHECK_PYTHON = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 2; }

.PHONY: demo test test-verl faults mutants notebooks docs check clean

demo: .venv/installed
	$(BIN)/minicpgd demo

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile

test-verl: .venv-verl/installed
	.venv-verl/bin/python -m pytest tests/parity/test_parity_verl.py tests/test_verl_plugin.py tests/test_verl_paths.py

faults: .venv/installed
	$(BIN)/python benchmarks/faults.py

mutants: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[mutants]'
	$(BIN)/python benchmarks/mutants.py

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
	$(CHECK_PYTHON)
	@echo "setting up .venv, once: a few minutes of silence while packages are fetched"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

# verl 0.9.1 imports the last three in its trainer without asking for them
.venv-verl/installed: pyproject.toml
	$(CHECK_PYTHON)
	@echo "setting up .venv-verl, once: a few minutes of silence while packages are fetched"
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --editable '.[verl]' 'pytest>=8' cachetools fastapi uvicorn
	@touch $@

clean:
	rm -rf .venv .venv-verl mutants build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# make demo       trains CPGD and three baselines on your CPU
# make test       runs the test suite
# make check      runs the linter, the formatter, the type checker and the import contract
# make notebooks  runs the notebooks and saves their outputs
# make docs       builds the site
# make faults     kills runs and damages their files, and checks that they recover
# make mutants    changes the code in many places, and checks that a test fails each time
# make test-verl  runs our losses inside verl
# make newest     runs the test suite with the newest version of every package
# make lock       rewrites requirements.lock and requirements-verl.lock
#
# Each command creates the environment that it needs. docs/installation.md has the same commands without make.

# A shell may forbid Python to store compiled modules. Then each process compiles torch again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN := .venv/bin
PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The lock files hold the exact versions that were tested. pip obeys them and the constraints in PIP_CONSTRAINT.
# Python compiles a module at its first import. pip would compile all modules, which takes most of an installation.
PIP := -m pip --disable-pip-version-check
INSTALL_NEWEST := $(PIP) install --no-compile --editable
INSTALL := $(PIP) install --no-compile --constraint requirements.lock --editable
INSTALL_VERL := $(PIP) install --no-compile --constraint requirements-verl.lock pytest --editable

CHECK_PYTHON = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "minicpgd needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 2; }

.PHONY: demo test check notebooks docs faults mutants test-verl newest lock clean

demo: .venv/demo-installed
	$(BIN)/minicpgd demo

test: .venv/installed
	$(BIN)/python $(PYTEST)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

notebooks: .venv/installed
	$(BIN)/python notebooks/build.py

docs: .venv/installed
	$(BIN)/python docs/build.py

faults: .venv/installed
	$(BIN)/python benchmarks/faults.py

mutants: .venv/installed
	$(BIN)/python $(INSTALL) '.[mutants]' --quiet
	$(BIN)/python benchmarks/mutants.py

test-verl: .venv-verl/installed
	.venv-verl/bin/python -m pytest tests/parity/test_parity_verl.py tests/test_verl_plugin.py tests/test_verl_paths.py

# The demo needs no extra.
.venv/demo-installed: pyproject.toml requirements.lock
	$(CHECK_PYTHON)
	@echo "Creating .venv. This happens once. pip names each package that it collects, then unpacks them silently (a minute)."
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) .
	@touch $@

.venv/installed: .venv/demo-installed
	@echo "Adding the packages of the test suite to .venv. This happens once."
	$(BIN)/python $(INSTALL) '.[test]'
	@touch $@

# verl needs an older transformers, and therefore an environment of its own.
.venv-verl/installed: pyproject.toml requirements-verl.lock
	$(CHECK_PYTHON)
	@echo "Creating .venv-verl. This happens once. pip names each package that it collects, then unpacks them silently (a minute)."
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python $(INSTALL_VERL) '.[verl]'
	@touch $@

# newest and lock ignore the lock files. They start from empty environments, so that pip finds the newest versions.
newest:
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python $(INSTALL_NEWEST) '.[test]'
	.venv-newest/bin/python $(PYTEST)

# The oldest supported Python makes the lock files: versions that support 3.11 support newer ones, too.
lock:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "make lock needs Python 3.11: make lock PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python $(INSTALL_NEWEST) '.[all,mutants]'
	$(call write_lock,requirements.lock)
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python $(INSTALL_NEWEST) '.[verl]' pytest
	$(call write_lock,requirements-verl.lock)
	rm -rf .venv-lock

# A lock file keeps its comments. It names no build of torch (+cpu, +cu130) and no package that only a CUDA build needs.
write_lock = { grep '^\#' $(1); .venv-lock/bin/python $(PIP) freeze --exclude-editable \
	| sed -E '/^(nvidia|cuda|triton)/d; s/\+.*//'; } > $(1).new && mv $(1).new $(1)

clean:
	rm -rf .venv .venv-* mutants build wheelhouse *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

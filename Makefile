# everstep's few commands. Each prepares what it needs in $(VENV) the first time and is quick after that.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements-dev.lock
STAMP := $(VENV)/.installed
# as in an activated environment: tests start torchrun and everstep by name
ACTIVATED := PATH="$(abspath $(BIN)):$$PATH"
# two test processes: end-to-end tests start two to four ranks each
PYTEST_FLAGS ?= -n 2 --dist loadgroup
TESTS ?= tests

.PHONY: help setup demo test check docs format lock benchmark benchmark-snapshot benchmark-drain benchmark-recovery benchmark-goodput soak clean

help:
	@echo "make demo       train with two workers, kill one, watch it come back (about a minute)"
	@echo "make test       all tests;  make test TESTS=tests/decide PYTEST_FLAGS=-x  for some"
	@echo "make check      formatter, linter, strict types, layers, documentation"
	@echo "make docs       the documentation's site, in build/site"
	@echo "make format     let the formatter and the linter rewrite what they can"
	@echo "make benchmark  what the supervisor itself costs"
	@echo "make benchmark-recovery  from a kill to the next first step, beside torchrun, ft_launcher and a shell loop"
	@echo "make benchmark-goodput  useful steps under a failure every 10 to 20 seconds, beside torchrun with dcp.async_save"
	@echo "make soak       500 failures in a row, and nothing may be left behind;  SOAK_FLAGS='--light' in a quarter of an hour"
	@echo "make benchmark-snapshot  what a snapshot costs the training, beside torch.save and dcp.async_save"
	@echo "make benchmark-drain  from a snapshot to a durable checkpoint, beside cp and a plain upload"
	@echo "make lock       renew $(LOCK) from pyproject.toml"

$(STAMP): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"everstep needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 ...")'
	@echo 'preparing $(VENV) (a minute or so, once)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(LOCK) --editable '.[dev]'
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(ACTIVATED) $(BIN)/python examples/demo.py

test: $(STAMP)
	$(ACTIVATED) $(BIN)/python -m pytest $(PYTEST_FLAGS) $(TESTS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/zensical build --strict --clean

docs: $(STAMP)
	$(BIN)/zensical build --strict --clean

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(STAMP)
	$(ACTIVATED) $(BIN)/python benchmarks/supervisor_cost.py

benchmark-snapshot: $(STAMP)
	$(ACTIVATED) $(BIN)/python benchmarks/snapshot.py

benchmark-drain: $(STAMP)
	$(ACTIVATED) $(BIN)/python benchmarks/drain.py

benchmark-recovery: $(STAMP)
	$(ACTIVATED) $(BIN)/python benchmarks/recovery.py

benchmark-goodput: $(STAMP)
	$(ACTIVATED) $(BIN)/python benchmarks/goodput.py

soak: $(STAMP)
	$(ACTIVATED) $(BIN)/python benchmarks/soak.py $(SOAK_FLAGS)

# From nothing, so that nothing stale is pinned. torch stands first: the development version is chosen, not found.
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	printf '%s\n' '# Exact versions for development, used with pip --constraint. Written by: make lock' > $(LOCK)
	$(VENV)-lock/bin/python -m pip freeze --all --exclude everstep --exclude pip | sed 's/+[a-z0-9.]*$$//' >> $(LOCK)
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) $(VENV)-lock $(VENV)-peers build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Everything happens in .venv, which these targets make, and which `make clean` takes away; nothing outside it changes.
.PHONY: demo test style check docs linkcheck clean
.NOTPARALLEL:

DEMO_PHOTO ?= examples/images/coffee.jpg
DEMO_PROMPT ?= --box 75,15,480,385

PYTHON ?= python3
PYTEST_ARGS ?= -n 2
CONSTRAINTS ?= constraints.txt

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# Settings of the user's own environment that would leak into ours.
unexport PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX
export PIP_USER := 0

demo: .venv/core
	@mkdir -p demo
	$(BIN)/efficientsam predict $(DEMO_PHOTO) $(DEMO_PROMPT) --output demo/overlay.png --json demo/masks.json

test: .venv/dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

style: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/typos

docs: .venv/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -j 2 -b html docs docs/_build/html
	$(BIN)/linkchecker --config docs/linkcheckerrc docs/_build/html/index.html
	@echo "docs/_build/html/index.html"

# Links that lead out, which needs the network.
linkcheck: docs
	$(BIN)/python -m sphinx --quiet -D nb_execution_mode=off -b linkcheck docs docs/_build/linkcheck

clean:
	rm -rf .venv demo dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Each stamp is one finished install; a changed pyproject.toml or lock makes it stale, and pip then changes what differs.
# pip 22 is the first that understands all that pyproject.toml says; only a Python 3.10 of the first days is older.
.venv/core: pyproject.toml $(CONSTRAINTS)
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer wanted, $(PYTHON) is $$("$(PYTHON)" --version 2>&1): name another with make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -m venv .venv >/dev/null || { echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@echo "Installing into .venv; torch makes the first time a long one."
	$(PIP) "pip>=22"
	$(PIP) -c $(CONSTRAINTS) -e .
	@touch $@

# LVIS's own evaluation, a reference in the tests, asks for an OpenCV that would lie over the one that is wanted.
.venv/dev: .venv/core
	$(PIP) -c $(CONSTRAINTS) -e ".[dev]"
	$(PIP) -c $(CONSTRAINTS) --no-deps lvis
	@touch $@

# Mask R-CNN's tests show it to a Python of their own; nothing else sees it, and it asks for no other torch.
.venv/torchvision: .venv/dev
	$(PIP) -c $(CONSTRAINTS) --no-deps --upgrade --target $@ torchvision
	@touch $@

.venv/docs: .venv/core
	$(PIP) -c $(CONSTRAINTS) -e ".[docs]"
	@touch $@

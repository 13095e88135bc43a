# Two commands for a fresh machine with Python 3.11 and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check docs clean

demo: $(INSTALLED)
	$(BIN)/tunesmith demo --output runs/demo-$$(date +%Y%m%d-%H%M%S)

# a worker for each core, of one thread each: torch's threads of several processes would slow each other
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/one_row.py --write

# torch goes first and by its exact version: any other spelling may pull several gigabytes of CUDA packages
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache

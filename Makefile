# make demo: set up, then tokenizer, mix, training, evaluation and text, offline, in minutes
# make gpu: the smoke suite of tests/gpu, on a machine with a GPU
# make test: set up, then all tests but the slow ones; make test-all: those, too
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all gpu lint bench docs clean

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/done
	$(BIN)/rmkv demo

# One thread: the tests are small, and threads that wait for each other are slow on a busy machine.
test test-all: export OMP_NUM_THREADS = 1

test: .venv/done
	$(BIN)/pytest -n 2 --dist worksteal

test-all: .venv/done
	$(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow"

gpu: .venv/done
	$(BIN)/pytest tests/gpu -s

lint: .venv/done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/done
	$(BIN)/python benchmarks/speed.py

# The references, then the site of all pages, in site/: a link or an anchor that leads nowhere is an error.
docs: .venv/done
	$(BIN)/python docs/make_cli_reference.py
	$(BIN)/python docs/make_config_reference.py
	$(BIN)/sphinx-build -qEW docs site

clean:
	rm -rf .venv demo site

# make demo: set up, then tokenizer, mix, training, evaluation and text, offline, in minutes
# make gpu: the smoke suite of tests/gpu, on a machine with a GPU
# make test: set up, then all tests but the slow ones; make test-all: those, too
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all gpu lint bench docs clean

# .venv/demo exists when the demo's packages are installed, .venv/dev when the developers' are, which include them. Python
# compiles modules when it first imports them: compiling all of them takes more than half of the installation.
.venv/demo: EXTRA = plot
.venv/dev: EXTRA = dev
.venv/demo .venv/dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$(EXTRA)]'
	touch .venv/demo $@

$(BIN)/pip:
	$(PYTHON) -m venv .venv

demo: .venv/demo
	$(BIN)/rmkv demo

# One thread: the tests are small, and threads that wait for each other are slow on a busy machine.
test test-all: export OMP_NUM_THREADS = 1

test: .venv/dev
	$(BIN)/pytest -n 2 --dist worksteal

test-all: .venv/dev
	$(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow"

gpu: .venv/dev
	$(BIN)/pytest tests/gpu -s

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/dev
	$(BIN)/python benchmarks/speed.py

# The references, then the site of all pages, in site/: a link or an anchor that leads nowhere is an error.
docs: .venv/dev
	$(BIN)/python docs/make_cli_reference.py
	$(BIN)/python docs/make_config_reference.py
	$(BIN)/sphinx-build -qEW docs site

clean:
	rm -rf .venv demo site

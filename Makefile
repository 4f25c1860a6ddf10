# make demo: an adapter and a comparison on real reviews. make decoder: the small decoder again. make test: lint, types,
# tests. make test-all: the same with every optional stack. All install into .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_ALL := $(VENV)/.installed-all
MODULE ?= src/loraplus/rates.py
SECONDS ?= 900
PYTEST := $(BIN)/python -m pytest -n 2
# What moves every month. The oldest that the ranges of pyproject.toml let in; torch stays as it is pinned.
MOVING := transformers peft trl accelerate
OLDEST := transformers==5.20.0 peft==0.21.0 trl==1.16.0 accelerate==1.15.0

.PHONY: help install demo picture decoder docs test test-all test-newest test-oldest faults mutants lint types fmt clean

help:
	@echo "make demo     compare LoRA with LoRA+ on movie reviews (15 to 20 minutes on 2 cores)"
	@echo "make decoder  pre-train the small decoder of examples/decoder anew, into data/decoder (under half an hour on 2 cores)"
	@echo "make docs     build the documentation as a site, into docs/_build/html"
	@echo "make test     lint, types and tests"
	@echo "make test-all the same with every optional stack installed; prints which stack passed what"
	@echo "make test-newest, make test-oldest   the tests with the newest transformers, peft, trl and accelerate, or the oldest"
	@echo "make faults   kills, damage, bad input, full load: does anything get lost (under half an hour on 2 cores)"
	@echo "make mutants  change MODULE=src/loraplus/rates.py in small ways for SECONDS=900; shows what no near test notices"
	@echo "make fmt      format the code"
	@echo "make clean    remove the virtual environment, data and caches (not runs/)"

install: $(STAMP)

# torch comes first, pinned and through pip: a looser requirement may bring a build several gigabytes larger.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "loraplus needs Python 3.11 or newer; set PYTHON=python3.12, say"; exit 2; }
	@# pip, not only python: an interrupted run may have left half an environment.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/making/demo_data.py data
	$(BIN)/loraplus compare --config examples/demo.yaml --output runs/demo --resume

# The head of the demo's report, as README.md and docs/report.md show it.
picture: demo
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=920,748 --virtual-time-budget=6000 \
		--screenshot=docs/images/report.png file://$(CURDIR)/runs/demo/report.html

# Warnings are errors: a link or heading that is not there, a page in no table of contents. Nothing is fetched.
docs: install
	@rm -rf docs/_build
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Interrupted, it goes on from its last checkpoint.
decoder: install
	$(BIN)/python examples/making/decoder.py --output data/decoder

test: lint types
	$(PYTEST)

test-all: lint types $(STAMP_ALL)
	$(PYTEST)

# deepspeed's setup looks for a CUDA compiler unless told to build nothing.
$(STAMP_ALL): $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable ".[dev,all]"
	touch $@

# Each in an environment of its own. The list of versions comes first, what broke last.
test-newest test-oldest: test-%: $(VENV)-%/.installed
	$(VENV)-$*/bin/python -m pip install --quiet $(if $(filter oldest,$*),$(OLDEST),--upgrade $(MOVING))
	$(VENV)-$*/bin/python -m pip list 2>/dev/null | grep -E "^(torch|$(shell echo $(MOVING) | tr ' ' '|')) "
	$(VENV)-$*/bin/python -m pytest -n 2

$(VENV)-%/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-$*/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

faults: install
	$(BIN)/python benchmarks/faults/every.py --output runs/faults

mutants: install
	$(BIN)/python tests/mutants.py $(MODULE) --seconds $(SECONDS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

fmt: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest data build dist docs/_build .pytest_cache .ruff_cache src/*.egg-info

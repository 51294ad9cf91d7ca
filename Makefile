# make demo: fine-tune a real chat model and talk to it.  make demo-vlm: teach it to see.
# make test: all set-up and the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
NAME ?= Xiaolan
AUTHOR ?= the xtuner_lite team

.PHONY: demo demo-vlm test test-slow reliability lint format bench clean

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/xtuner-lite demo --name "$(NAME)" --author "$(AUTHOR)"

demo-vlm: $(VENV)/.installed
	$(BIN)/xtuner-lite demo-vlm

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

reliability: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/reliability.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/sft_throughput.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

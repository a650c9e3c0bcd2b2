# Everything runs in $(VENV). `make PYTHON=python3.12 install` chooses the Python that it is made with.
VENV ?= .venv
PYTHON ?= python3
ARGS ?=

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: install demo test faults lint format bench clean

install: $(STAMP)

# torch comes first and alone, so that the build at hand (CPU or CUDA) is taken and nothing later replaces it.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(RUN) || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "make: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch
	$(RUN) -m pip install -q -c constraints.txt -e '.[dev,samples]'
	@touch $@

demo: install
	$(RUN) pipelines/demo.py $(ARGS)

test: lint
	$(RUN) -m mypy
	$(RUN) -m pytest -q --durations=10 $(ARGS)

# The long injected faults too, as a table of what happened; then a pretraining that is killed twenty times, on one process or two.
faults: install
	$(RUN) -m tests.faults.faults $(ARGS)
	$(RUN) tests/faults/day.py --ranks 1 2

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: install
	$(RUN) pipelines/benchmark.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mae_core modalities pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +
